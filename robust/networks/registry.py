"""All network families. A new architecture is one file and one line in `FAMILIES`."""

from __future__ import annotations

from torch import nn

from robust.networks import given, library, preact_resnet, resnet, wide_resnet
from robust.networks.family import Family, Reading, Shapes

FAMILIES: tuple[Family, ...] = (
    resnet.FAMILY,
    preact_resnet.FAMILY,
    wide_resnet.FAMILY,
    library.FAMILY,
    given.FAMILY,
)
ARCHS: tuple[str, ...] = tuple(arch for family in FAMILIES for arch in family.archs)


def family_of(arch: str) -> Family:
    """The family that builds `arch`. Raises ValueError that lists the architectures."""
    for family in FAMILIES:
        if isinstance(arch, str) and family.builds(arch):
            return family
    raise ValueError(
        f"expected arch to be one of {', '.join(ARCHS)}, timm:NAME or torchvision:NAME, got "
        f"{arch!r}{library.did_you_mean(str(arch), ARCHS)}"
    )


def build(
    arch: str,
    *,
    num_classes: int,
    stem: str,
    activation: str = "relu",
    variant: str = "",
    input_size: int = 32,
) -> nn.Module:
    """The network `arch`, freshly initialized: images float32 (N, 3, H, W) to logits (N, K).

    Raises ValueError for a name, stem, activation or variant that no family has.
    """
    check_choices(arch, stem=stem, activation=activation, variant=variant)
    return family_of(arch).build(
        arch,
        num_classes=num_classes,
        stem=stem,
        activation=activation,
        variant=variant,
        input_size=input_size,
    )


def check_choices(arch: str, *, stem: str, activation: str, variant: str) -> None:
    """Raise ValueError unless the family of `arch` has this stem, activation and variant."""
    family = family_of(arch)
    for name, value, allowed in (
        ("stem", stem, family.stems),
        ("activation", activation, family.activations),
        ("variant", variant, family.variants),
    ):
        if value not in allowed:
            shown = ", ".join(item or "''" for item in allowed)
            raise ValueError(f"expected {name} to be one of {shown} for {arch}, got {value!r}")


def read_layout(shapes: Shapes) -> Reading | None:
    """The network inferred from the keys and shapes of a state dict; None if it is unknown.

    Raises UnknownLayout for a network that a family recognizes but can't build.
    """
    for family in FAMILIES:
        reading = family.read(shapes) if family.read is not None else None
        if reading is not None:
            return reading
    return None
