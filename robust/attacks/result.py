"""The result of an attack."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """The result of an attack on N images.

    If no iterate fooled the model, `x_adv` is the one with the highest loss.
    """

    x_adv: Tensor  # float32 (N, C, H, W), in the ball and in [0, 1]
    logits: Tensor  # float32 (N, K): those of x_adv
    success: (
        Tensor  # bool (N,): predicted as another class than y, or as the target if there is one
    )
    distance: Tensor  # float32 (N,): of x_adv from the image, in the norm of the threat model
    forwards: Tensor  # int64 (N,): forward passes spent
    backwards: Tensor  # int64 (N,): backward passes spent

    def __repr__(self) -> str:
        farthest = max(self.distance.tolist(), default=0.0)
        return (
            f"AttackResult(success={int(self.success.sum())} of {len(self.success)}, "
            f"distance<={farthest:.4g}, x_adv={tuple(self.x_adv.shape)})"
        )
