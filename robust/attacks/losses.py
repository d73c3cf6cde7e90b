"""Losses that an attack climbs: of logits float32 (N, K) and classes int64 (N,), float32 (N,)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Literal["ce", "margin", "dlr"]
LOSSES: tuple[Loss, ...] = get_args(Loss)


def cross_entropy(logits: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Cross-entropy of `y`, or what lacks of it to `target`."""
    if target is None:
        return F.cross_entropy(logits, y, reduction="none")
    return -F.cross_entropy(logits, target, reduction="none")


def margin(logits: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """By how much the best other class leads `y`, or `target` leads all others.

    Above 0 where the attack has succeeded. Source: Carlini, Wagner 2017, arXiv:1608.04644.
    """
    sign, index = (-1, y) if target is None else (1, target)
    return sign * (_pick(logits, index) - _best_other(logits, index))


def dlr(logits: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Difference of logits ratio, the margin over the spread of the largest logits.

    Needs 3 classes, 4 with a target. Source: Croce, Hein 2020, arXiv:2003.01690.
    """
    ordered = logits.topk(3 if target is None else 4, dim=1).values
    if target is None:
        return margin(logits, y) / (ordered[:, 0] - ordered[:, 2] + 1e-12)
    spread = ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2
    return (_pick(logits, target) - _pick(logits, y)) / (spread + 1e-12)


FUNCTIONS = {"ce": cross_entropy, "margin": margin, "dlr": dlr}


def check_loss(name: str) -> None:
    """Raise ValueError unless `name` is that of a loss."""
    if name not in LOSSES:
        raise ValueError(f"expected a loss out of {', '.join(LOSSES)}, got {name!r}")


def classes_needed(loss: Loss, *, targeted: bool) -> int:
    """The fewest classes with which `loss` means anything."""
    return (4 if targeted else 3) if loss == "dlr" else 2


def _pick(logits: Tensor, index: Tensor) -> Tensor:
    return logits.gather(1, index.unsqueeze(1)).squeeze(1)


def _best_other(logits: Tensor, index: Tensor) -> Tensor:
    hidden = torch.zeros_like(logits, dtype=torch.bool).scatter(1, index.unsqueeze(1), True)
    return logits.masked_fill(hidden, -torch.inf).amax(dim=1)
