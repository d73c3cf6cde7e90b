"""The classifier: a ResNet with its normalisation inside."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from robust.resnet import BasicBlock, Bottleneck, ResNet

Arch = Literal["resnet18", "resnet34", "resnet50"]
Stem = Literal["imagenet", "cifar"]
Activation = Literal["relu", "silu"]
ARCHS: tuple[Arch, ...] = get_args(Arch)
STEMS: tuple[Stem, ...] = get_args(Stem)
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
MAX_CLASSES = 100_000  # beyond any real set; a broken sidecar must not ask for all memory


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a classifier is made of, enough to build it again.

    Raises ValueError for an unknown name, no classes, or a mean and std that are no three numbers.
    """

    arch: Arch = "resnet50"
    stem: Stem = "imagenet"  # imagenet: 7x7 stride 2 and max-pool; cifar: 3x3 stride 1, no pool
    activation: Activation = "relu"
    num_classes: int = 10
    input_size: int = 32  # pixels a side
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of the pixels, in [0, 1]
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        for field, allowed in (("arch", ARCHS), ("stem", STEMS), ("activation", ACTIVATIONS)):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"expected {field} out of {', '.join(allowed)}, got {getattr(self, field)!r}"
                )
        for field in ("num_classes", "input_size"):
            if type(getattr(self, field)) is not int:  # a sidecar may hold anything
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
    def normalises(self) -> bool:
        """Whether pixels are shifted or scaled before the first layer."""
        return self.mean != (0.0, 0.0, 0.0) or self.std != (1.0, 1.0, 1.0)


class Classifier(nn.Module):
    """Maps images float32 (N, 3, H, W) in [0, 1] to logits float32 (N, K).

    `net` has the state dict of torchvision's model; mean and std are part of the architecture, so
    eps outside is always in pixel units.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.net = _build_resnet(architecture)
        shape = (1, 3, 1, 1)
        self.register_buffer("mean", torch.tensor(architecture.mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(architecture.std).view(shape), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.architecture.normalises:
            x = (x - self.mean) / self.std
        logits: Tensor = self.net(x)
        return logits.float()

    def zero_residuals(self) -> None:
        """Set the last norm of every residual branch to zero: each block starts as identity.

        Source: Goyal et al. 2017, arXiv:1706.02677.
        """
        for module in self.net.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)
            elif isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)


def _build_resnet(architecture: Architecture) -> ResNet:
    net = ResNet(architecture.arch, architecture.num_classes)
    if architecture.stem == "cifar":
        net.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    if architecture.activation == "silu":
        for module in list(net.modules()):
            if isinstance(getattr(module, "relu", None), nn.ReLU):
                module.relu = nn.SiLU()
    return net


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises ValueError for one that is absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"expected a device such as auto, cpu or cuda, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"expected a device such as auto, cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"expected a CUDA device for {name!r}, found none; use auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"expected a CUDA device from 0 to {torch.cuda.device_count() - 1}, got {name!r}"
        )
    return device
