"""Networks that are loaded whole and can't be built from a name."""

from __future__ import annotations

from torch import nn

from robust.networks.family import Family

KINDS = ("python", "torchscript", "torch.export", "onnx", "service")


def build(
    arch: str, *, num_classes: int, stem: str, activation: str, variant: str, input_size: int
) -> nn.Module:
    """Raises ValueError: such a network is loaded, not built."""
    raise ValueError(f"expected a network that can be built from its name, got a {arch} model")


FAMILY = Family(
    archs=(),
    build=build,
    head=lambda net: "",
    stems=("own",),
    activations=("own",),
    matches=lambda arch: arch in KINDS,
)
