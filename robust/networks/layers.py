"""Layers that several families share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MethodDescriptorType
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

M = TypeVar("M", bound=nn.Module)


def convolution(
    channels: int, out: int, size: int, stride: int = 1, *, same: bool = False
) -> nn.Conv2d:
    """A square convolution without bias whose padding keeps the side at stride 1.

    With `same` a 3x3 one pads an even side like TensorFlow's `SAME`.
    """
    if same and stride == 2:
        return SameConv2d(channels, out)
    return nn.Conv2d(channels, out, size, stride=stride, padding=size // 2, bias=False)


class SameConv2d(nn.Conv2d):
    """A 3x3 convolution of stride 2, padded on the right and bottom only: TensorFlow's `SAME`."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, 3, stride=2, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Images (N, C, H, W) with even H and W to (N, out, H/2, W/2)."""
        return super().forward(F.pad(input, (0, 1, 0, 1)))


def activation_module(name: str) -> nn.Module:
    """`relu` or `silu`, computed in place where gradients allow it."""
    return nn.SiLU() if name == "silu" else nn.ReLU(inplace=True)


def named_blocks(net: nn.Module, *kinds: type[M]) -> Iterator[tuple[str, M]]:
    """The modules of these kinds, in the order of the forward pass, with their names."""
    for name, module in net.named_modules():
        if isinstance(module, kinds):
            yield name, module


def initialize_convolutions(net: nn.Module) -> None:
    """Initialize every convolution's weights. Source: He et al. 2015, arXiv:1502.01852."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class SkipInitialization(TorchFunctionMode):
    """Context in which new layers are not initialized, for weights that a file overwrites.

    Initializing takes longer than reading a checkpoint. The global random state is unchanged.
    Where a function of `nn.init` itself needs samples, it gets zeros: `trunc_normal_` samples until
    all values are within its bounds, which memory that nobody has written may never be.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "").endswith(("uniform_", "normal_")):
            tensor = args[0] if args else kwargs["tensor"]
            return tensor.zero_() if isinstance(func, MethodDescriptorType) else tensor
        return func(*args, **kwargs)
