"""Models compiled with torch.compile, if the compiler works."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from robust.attacks import frozen
from training.optimizer import autocast
from training.recipe import Recipe

logger = logging.getLogger(__name__)


def compiles(recipe: Recipe, device: torch.device) -> bool:
    """Whether passes are compiled on this device, as the recipe says."""
    return recipe.compile == "on" or (recipe.compile == "auto" and device.type == "cuda")


def compiled_loss(model: nn.Module, x: Tensor, *, bf16: bool) -> nn.Module:
    """`model` compiled for the passes of the loss on images like `x`, in train mode.

    Shares parameters and buffers with `model`; returns `model` itself if the compiler fails.
    """

    def attempt(fast: nn.Module) -> None:
        model.train()
        with autocast(bf16, x.device):
            loss = fast(x).sum()
        loss.backward()

    return _compiled(model, attempt)


def compiled_attack(
    model: nn.Module, batches: Sequence[Tensor], *, bf16: bool, predicts: bool
) -> nn.Module:
    """`model` compiled for the gradient at images like each of `batches`, frozen in eval mode.

    With `predicts` also for predictions without a gradient. `bf16`: under autocast.
    """

    def attempt(fast: nn.Module) -> None:
        for x in batches:  # a graph for each size
            with frozen(model, x.device), autocast(bf16, x.device):
                images = x.detach().requires_grad_(True)
                torch.autograd.grad(fast(images).sum(), images)
                if predicts:
                    with torch.no_grad():
                        fast(x)

    return _compiled(model, attempt)


def _compiled(model: nn.Module, attempt: Callable[[nn.Module], None]) -> nn.Module:
    """`model` compiled, if `attempt` at its passes succeeds.

    Then no later step waits for the compiler, and a failing compiler is only an early warning.
    Leaves the model, its running statistics and its gradients unchanged.
    """
    before = {key: value.clone() for key, value in model.state_dict().items()}
    mode = model.training
    fast = cast(nn.Module, torch.compile(model, dynamic=False))
    try:
        attempt(fast)
    except Exception as error:  # compilers raise all kinds of exceptions
        reason = (str(error).strip().splitlines() or [""])[0]
        logger.warning(
            "torch.compile failed (%s: %s); continuing without it",
            type(error).__name__,
            reason[:200],
        )
        return model
    finally:
        model.zero_grad(set_to_none=True)
        model.load_state_dict(before)
        model.train(mode)
    return fast
