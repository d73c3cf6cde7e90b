"""Compares a faster copy of a model with the model itself: agreement and speedup."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How a copy compares with its model, from one gradient of each."""

    logit_error: float  # largest difference of logits, relative to the largest logit
    margin_error: float  # the same, relative to the median lead of the top class
    sign_agreement: float  # fraction of the gradient's signs that match
    speedup: float  # time of the model divided by that of the copy


def compare(copy: Model, model: Model, x: Tensor, y: Tensor, *, clear_speedup: float) -> Agreement:
    """The agreement of both models on the gradient of the cross-entropy at `x`.

    `x` is float32 (N, C, H, W) with labels `y` int64 (N,). The first pass also prepares kernels, so
    a second one is timed, unless the copy, which runs first, is `clear_speedup` times as fast
    already. Times are CPU time, which other load on the machine changes little.
    """
    (copy_logits, copy_gradient), copy_seconds = _gradient(copy, x, y)
    (logits, gradient), seconds = _gradient(model, x, y)
    if not seconds >= clear_speedup * copy_seconds:
        _, copy_seconds = _gradient(copy, x, y)
        _, seconds = _gradient(model, x, y)
    difference = (copy_logits - logits).abs().max()
    return Agreement(
        logit_error=float(difference / logits.abs().max().clamp_min(1e-12)),
        margin_error=margin_error(copy_logits, logits),
        sign_agreement=float((copy_gradient.sign() == gradient.sign()).float().mean()),
        speedup=seconds / copy_seconds,
    )


def margin_error(copy_logits: Tensor, logits: Tensor) -> float:
    """The largest difference of logits (N, K), relative to the median lead of the top class."""
    best = logits.topk(2, dim=1).values
    lead = (best[:, 0] - best[:, -1]).median()
    return float((copy_logits - logits).abs().max() / lead.clamp_min(1e-12))


def _gradient(model: Model, x: Tensor, y: Tensor) -> tuple[tuple[Tensor, Tensor], float]:
    """The logits and the gradient at the images, and the seconds they took."""
    begin = time.process_time()
    with torch.enable_grad():
        pixels = x.detach().requires_grad_()
        logits = model(pixels).float()
        loss = F.cross_entropy(logits, y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, pixels)
    return (logits.detach(), gradient), max(time.process_time() - begin, 1e-9)
