"""Adversarial weight perturbation: computes the loss at the worst nearby weights."""

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
    all_reduce_sum: Callable[[list[Tensor]], None] = lambda gradients: None,
) -> Iterator[None]:
    """Move the weights of `model` one step up `loss` within the block, then restore them.

    Each convolution and matrix moves along its own gradient by `gamma` times its own norm; batch
    norms and biases stay. Computing that direction does not change the running statistics. Compute
    loss and backward pass within the block. `gamma` 0 does nothing. If each rank has a shard of
    the batch, `all_reduce_sum` sums the gradients over the ranks, in place.
    Source: Wu et al. 2020, arXiv:2004.05884.
    """
    if gamma == 0:
        yield
        return
    weights: list[Tensor] = [p for p in model.parameters() if p.ndim > 1]
    with restored_running_statistics(model):
        gradients = list(torch.autograd.grad(loss(), weights))
    all_reduce_sum(gradients)
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            # A gradient of zero gives no direction, and that weight stays.
            weight.add_(gradient * (gamma * weight.norm() / gradient.norm().clamp_min(1e-12)))
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(weights, before)


@contextmanager
def restored_running_statistics(model: nn.Module) -> Iterator[None]:
    """Restore the running statistics of every batch norm after the block.

    Switching `track_running_stats` off instead would need a second compiled graph.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    statistics = [buffer for norm in norms for buffer in norm.buffers()]
    before = [buffer.clone() for buffer in statistics]
    try:
        yield
    finally:
        if statistics:
            torch._foreach_copy_(statistics, before)
