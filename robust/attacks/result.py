"""What an attack gives back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """One row for each of N images.

    `x_adv` float32 (N, C, H, W) lies in the ball and in [0, 1]; where nothing fooled the model it
    is the iterate of the highest loss. `logits` are those of `x_adv`.
    """

    x_adv: Tensor
    logits: Tensor  # float32 (N, K)
    success: Tensor  # bool (N,): another class than y, or the target where one was asked for
    distance: Tensor  # float32 (N,) in the norm of the threat model
    forwards: Tensor  # int64 (N,): forward passes spent
    backwards: Tensor  # int64 (N,): backward passes spent
