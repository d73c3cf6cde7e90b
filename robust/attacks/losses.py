"""Losses to maximize, float32 (N,): functions of logits float32 (N, K) and classes int64 (N,)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Literal["ce", "margin", "dlr", "pm"]
LOSSES: tuple[Loss, ...] = get_args(Loss)


def cross_entropy(logits: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """The cross-entropy of `y`, or the negative cross-entropy of `target`."""
    if target is None:
        return F.cross_entropy(logits, y, reduction="none")
    return -F.cross_entropy(logits, target, reduction="none")


def margin(logits: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """The largest other logit minus that of `y`, or the logit of `target` minus the largest other.

    Positive if the attack has succeeded. Source: Carlini, Wagner 2017, arXiv:1608.04644.
    """
    sign, index = (-1, y) if target is None else (1, target)
    return sign * (_pick(logits, index) - _best_other(logits, index))


def dlr(logits: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Difference of logits ratio: the margin divided by the spread of the largest logits.

    Needs 3 classes, or 4 with a target. Source: Croce, Hein 2020, arXiv:2003.01690.
    """
    ordered = logits.topk(3 if target is None else 4, dim=1).values
    if target is None:
        return margin(logits, y) / (ordered[:, 0] - ordered[:, 2] + 1e-12)
    spread = ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2
    return (_pick(logits, target) - _pick(logits, y)) / (spread + 1e-12)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """`dlr` toward `target`, or the margin if there are too few classes."""
    return (dlr if logits.shape[1] >= 4 else margin)(logits, y, target)


def probability_margin(logits: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """The `margin` of the probabilities instead of the logits.

    Source: Xie et al. 2024, arXiv:2411.15210.
    """
    return margin(logits.softmax(dim=1), y, target)


def logit_gap(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The logit of `target` minus that of `y`."""
    pair = torch.stack([y, target], dim=1)
    of_y, of_target = logits.gather(1, pair).unbind(dim=1)
    return of_target - of_y


FUNCTIONS = {"ce": cross_entropy, "margin": margin, "dlr": dlr, "pm": probability_margin}


def check_loss(name: str) -> None:
    """Raise ValueError unless `name` is one of `LOSSES`."""
    if name not in LOSSES:
        raise ValueError(f"expected loss to be one of {', '.join(LOSSES)}, got {name!r}")


def classes_needed(loss: Loss, *, targeted: bool) -> int:
    """The fewest classes for which `loss` is defined."""
    return (4 if targeted else 3) if loss == "dlr" else 2


def _pick(logits: Tensor, index: Tensor) -> Tensor:
    return logits.gather(1, index.unsqueeze(1)).squeeze(1)


def _best_other(logits: Tensor, index: Tensor) -> Tensor:
    return logits.scatter(1, index.unsqueeze(1), -torch.inf).amax(dim=1)
