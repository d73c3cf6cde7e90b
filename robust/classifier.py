"""The classifier: a network of any family with its normalization inside."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust import networks
from robust.choices import ACTIVATIONS, MAX_CLASSES, STEMS, Activation, Stem
from robust.device import resolve_device

ARCHS = networks.ARCHS
__all__ = [
    "ACTIVATIONS",
    "ARCHS",
    "STEMS",
    "Activation",
    "Architecture",
    "Classifier",
    "Stem",
    "resolve_device",
]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The architecture of a classifier, which is enough to rebuild it.

    Raises ValueError for an unknown name, no classes, or a mean or std that is not three numbers.
    """

    arch: str = "resnet50"
    stem: str = "imagenet"  # imagenet: 7x7 stride 2 and max-pool; cifar: 3x3 stride 1, no pool
    activation: str = "relu"
    variant: str = ""  # distinguishes networks of the same name, see the family's file
    num_classes: int = 10
    input_size: int = 32  # width and height in pixels
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of the pixels, in [0, 1]
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        networks.check_choices(
            self.arch, stem=self.stem, activation=self.activation, variant=self.variant
        )
        for field in ("num_classes", "input_size"):
            if type(getattr(self, field)) is not int:  # a sidecar may contain anything
                raise ValueError(f"expected {field} a whole number, got {getattr(self, field)!r}")
        if not 2 <= self.num_classes <= MAX_CLASSES:
            raise ValueError(f"expected 2 to {MAX_CLASSES} classes, got {self.num_classes}")
        if not 8 <= self.input_size <= 1024:
            raise ValueError(f"expected an input size of 8 to 1024 pixels, got {self.input_size}")
        if len(self.mean) != 3 or not all(map(math.isfinite, self.mean)):
            raise ValueError(f"expected a mean of 3 finite numbers, got {self.mean}")
        if len(self.std) != 3 or not all(0 < s < math.inf for s in self.std):
            raise ValueError(f"expected a std of 3 positive numbers, got {self.std}")

    @property
    def normalizes(self) -> bool:
        """Whether pixels are shifted or scaled before the first layer."""
        return self.mean != (0.0, 0.0, 0.0) or self.std != (1.0, 1.0, 1.0)


class Classifier(nn.Module):
    """Maps images float32 (N, 3, H, W) in [0, 1] to logits float32 (N, K).

    `net` is the bare network, with the key names of its public code; a given `net` is used as it
    is. Mean and std are part of the classifier, so eps is always in pixel units. `classes` are the
    class names; they are numbers if a checkpoint has none.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, architecture: Architecture, *, net: nn.Module | None = None) -> None:
        super().__init__()
        self.architecture = architecture
        self.classes = tuple(map(str, range(architecture.num_classes)))
        self.net = net or networks.build(
            architecture.arch,
            num_classes=architecture.num_classes,
            stem=architecture.stem,
            activation=architecture.activation,
            variant=architecture.variant,
            input_size=architecture.input_size,
        )
        shape = (1, 3, 1, 1)
        self.register_buffer("mean", torch.tensor(architecture.mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(architecture.std).view(shape), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits float32 (N, K) of images float32 (N, 3, H, W) in [0, 1]."""
        if self.architecture.normalizes:
            x = (x - self.mean) / self.std
        logits: Tensor = self.net(x)
        return logits.float()

    @property
    def differentiable(self) -> bool:
        """Whether it has gradients; an ONNX file or a service does not."""
        return bool(getattr(self.net, "differentiable", True))

    def zero_residuals(self) -> None:
        """Initialize every residual block as the identity.

        Raises ValueError for a family that has no such blocks. Source: Goyal et al. 2017,
        arXiv:1706.02677.
        """
        family = networks.family_of(self.architecture.arch)
        if family.residual_ends is None:
            raise ValueError(f"expected a network of residual blocks, got {self.architecture.arch}")
        for weight in family.residual_ends(self.net):
            nn.init.zeros_(weight)
