"""The sizes of a network's feature maps."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn


def convolution_sides(net: nn.Module, input_size: int) -> dict[str, tuple[int, int]]:
    """The sides in pixels of the input and output of each convolution of `net`, by name.

    Runs one image in eval mode and leaves `net` unchanged. Not on torch's meta device, where
    convolutions import the compiler, 900 modules. Raises the exception of `net` for a size that
    it does not support.
    """
    sides: dict[str, tuple[int, int]] = {}

    def record(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sides[name] = inputs[0].shape[-1], output.shape[-1]

    modes = {module: module.training for module in net.modules()}
    hooks = [
        module.register_forward_hook(partial(record, name))
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    weight = next(net.parameters())
    try:
        with torch.no_grad():
            net.eval()(weight.new_zeros(1, 3, input_size, input_size))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return sides
