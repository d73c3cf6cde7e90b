"""Run an attack on a model and leave the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Model = Callable[[Tensor], Tensor]


@contextmanager
def frozen(model: Model, device: torch.device) -> Iterator[None]:
    """Hold `model` in eval mode with parameters that need no gradient.

    On leaving, also by an exception, the train or eval mode of every module, `requires_grad` of
    every parameter and the global random state are what they were. A callable that is no module
    is taken as it is; only the random state is kept. A caller's inference mode is left meanwhile.
    One thread at a time: two that hold the same model would each put back what the other set.
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
