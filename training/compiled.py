"""Passes through torch.compile, where the compiler can."""

from __future__ import annotations

import logging
from typing import cast

import torch
from torch import Tensor, nn

from robust.attacks import frozen
from training.awp import running_statistics_kept
from training.optimise import autocast
from training.recipe import Recipe

logger = logging.getLogger(__name__)


def compiles(recipe: Recipe, device: torch.device) -> bool:
    """Whether passes are compiled on this device, as the recipe says."""
    return recipe.compile == "on" or (recipe.compile == "auto" and device.type == "cuda")


def compiled(model: nn.Module, x: Tensor, *, bf16: bool, awp: bool = False) -> nn.Module:
    """`model` compiled, with the same parameters and buffers; where that fails, `model` itself.

    The graphs of a step are made and tried here, on images like `x`: that of the loss in train
    mode, with `awp` the same beside the running statistics, and in eval mode with frozen weights
    those of a gradient to the image and of a prediction. So no step waits, and a compiler that
    can't is a warning at the start. The model is left as it was, its statistics and gradients too.
    """
    before = {key: value.clone() for key, value in model.state_dict().items()}
    mode = model.training
    fast = cast(nn.Module, torch.compile(model, dynamic=False))
    try:
        _try_loss(fast, x, bf16=bf16)
        if awp:
            with running_statistics_kept(model):
                _try_loss(fast, x, bf16=bf16)
        _try_attack(fast, x, bf16=bf16)
    except Exception as error:  # compilers raise what they like
        reason = (str(error).strip().splitlines() or [""])[0]
        logger.warning(
            "torch.compile failed (%s: %s); the run goes on without it",
            type(error).__name__,
            reason[:200],
        )
        return model
    finally:
        model.zero_grad(set_to_none=True)
        model.load_state_dict(before)
        model.train(mode)
    return fast


def _try_loss(model: nn.Module, x: Tensor, *, bf16: bool) -> None:
    model.train()
    with autocast(bf16, x.device):
        loss = model(x).sum()
    loss.backward()


def _try_attack(model: nn.Module, x: Tensor, *, bf16: bool) -> None:
    with frozen(model, x.device), autocast(bf16, x.device):
        x = x.detach().requires_grad_(True)
        torch.autograd.grad(model(x).sum(), x)
        with torch.no_grad():
            model(x.detach())
