"""Compares a faster copy with its model: agreement and speedup."""

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
    """The comparison of a copy with its model, from a gradient of both."""

    off: float  # largest difference of logits, relative to the largest logit
    blurred: float  # the same, relative to the median lead of the likeliest class over the second
    signs: float  # share of the gradient's signs that match
    speedup: float  # time of the model divided by that of the copy


def compare(copy: Model, model: Model, x: Tensor, y: Tensor, *, clear: float) -> Agreement:
    """The gradient of the cross-entropy at `x` float32 (N, C, H, W) with labels `y`, from both.

    The first pass prepares kernels, so a second one is timed, unless the copy, which runs first,
    is `clear` times as fast already. Times are CPU time, which other load changes little.
    """
    (rough, slope), fewer = _gradient(copy, x, y)
    (logits, gradient), seconds = _gradient(model, x, y)
    if not seconds >= clear * fewer:
        _, fewer = _gradient(copy, x, y)
        _, seconds = _gradient(model, x, y)
    difference = (rough - logits).abs().max()
    best = logits.topk(min(2, logits.shape[1]), dim=1).values
    lead = (best[:, 0] - best[:, -1]).median()
    return Agreement(
        off=float(difference / logits.abs().max().clamp_min(1e-12)),
        blurred=float(difference / lead.clamp_min(1e-12)),
        signs=float((slope.sign() == gradient.sign()).float().mean()),
        speedup=seconds / fewer,
    )


def _gradient(model: Model, x: Tensor, y: Tensor) -> tuple[tuple[Tensor, Tensor], float]:
    """Logits, gradient at the images, and seconds."""
    begin = time.process_time()
    with torch.enable_grad():
        pixels = x.detach().requires_grad_()
        logits = model(pixels).float()
        loss = F.cross_entropy(logits, y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, pixels)
    return (logits.detach(), gradient), max(time.process_time() - begin, 1e-9)
