"""Freezes a model during an attack and restores it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Model = Callable[[Tensor], Tensor]


@contextmanager
def frozen(model: Model, device: torch.device) -> Iterator[None]:
    """Keep `model` in eval mode, with parameters that need no gradient.

    Restores the previous settings on exit, also after an exception: the train or eval mode of
    every module, `requires_grad` of every parameter and the global random state. For a callable
    that is not a module, only the random state is restored. A caller's inference mode is suspended.
    Not safe for two threads with the same model: each would restore the other's settings.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    flags = [parameter.requires_grad for parameter in parameters]
    devices = [device] if device.type == "cuda" else []
    with torch.inference_mode(False), torch.random.fork_rng(devices=devices):
        try:
            for module in modules:
                module.training = False
            for parameter in parameters:
                parameter.requires_grad_(False)
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            for parameter, flag in zip(parameters, flags, strict=True):
                parameter.requires_grad_(flag)
