"""Adversarial weight perturbation: the loss is taken where nearby weights make it worst."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def perturbed(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    gamma: float,
    add_up: Callable[[list[Tensor]], None] = lambda gradients: None,
) -> Iterator[None]:
    """Hold the weights of `model` where one step up `loss` takes them, and put them back.

    Each filter bank and matrix moves along its own gradient by `gamma` times its own norm; norms
    and biases stay. The pass that finds the direction leaves the running statistics of batch norm
    alone. What the block computes, backward included, is of the perturbed weights. `gamma` 0 does
    nothing. Where each rank has a share of the loss, `add_up` puts the sum over the ranks into the
    gradients. Source: Wu et al. 2020, arXiv:2004.05884.
    """
    if gamma == 0:
        yield
        return
    weights = [p for p in model.parameters() if p.ndim > 1]
    with running_statistics_kept(model):
        gradients = list(torch.autograd.grad(loss(), weights))
    add_up(gradients)
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            # A gradient of zero gives no direction, and that weight stays.
            weight.add_(gradient * (gamma * weight.norm() / gradient.norm().clamp_min(1e-12)))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Let batch norm use those of the batch without following them."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    flags = [norm.track_running_stats for norm in norms]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm, flag in zip(norms, flags, strict=True):
            norm.track_running_stats = flag
