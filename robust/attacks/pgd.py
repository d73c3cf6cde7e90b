"""Projected gradient descent and, as its single step, the fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust.attacks.algorithm import Algorithm
from robust.attacks.losses import FUNCTIONS, Loss, check_loss
from robust.attacks.noise import normal, uniform
from robust.attacks.rows import Rows, Table
from robust.choices import Norm
from robust.geometry import column, lengths, project, steepest


@dataclass(kw_only=True)
class PGDState(Table):
    """Columns of `PGD`."""

    iteration: Tensor  # int64 (N,): steps taken


@dataclass(frozen=True, kw_only=True)
class PGD(Algorithm[PGDState]):
    """Steps along the gradient, each projected into the ball; see `robust.attacks.pgd`."""

    relative_alpha: float  # step size as a fraction of eps, so that each image can have its own
    random_start: bool = True  # False: the first run starts at the image
    loss_name: Loss = "ce"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self.loss_name)
        if not self.relative_alpha >= 0:
            raise ValueError(f"expected alpha of at least 0, got {self.relative_alpha:g} times eps")

    @classmethod
    def default_alpha(cls, eps: float, steps: int) -> float:
        return default_alpha(eps, steps)

    def begin(self, rows: Rows[PGDState]) -> PGDState:
        if self.random_start or self.runs > 1:
            moved = column((rows.run > 0) | self.random_start)
            start = random_point(rows.x, rows.key, rows.run, norm=self.norm, eps=rows.eps)
            rows.x_adv = torch.where(moved, start, rows.x)
        return PGDState(iteration=torch.zeros_like(rows.y))

    def needs_gradient(self, rows: Rows[PGDState]) -> Tensor:
        return rows.state.iteration < self.steps

    def loss(self, logits: Tensor, rows: Rows[PGDState]) -> Tensor:
        return FUNCTIONS[self.loss_name](logits, rows.y, rows.target if self.targeted else None)

    def advance(
        self, rows: Rows[PGDState], logits: Tensor, loss: Tensor, gradient: Tensor | None
    ) -> Tensor:
        if gradient is None:
            return torch.ones_like(rows.fooled)
        alpha = self.relative_alpha * rows.eps
        rows.x_adv = ascend(rows.x_adv, gradient, x=rows.x, norm=self.norm, eps=rows.eps, by=alpha)
        rows.state.iteration = rows.state.iteration + 1
        return torch.zeros_like(rows.fooled)


def ascend(
    x_adv: Tensor, gradient: Tensor, *, x: Tensor, norm: Norm, eps: Tensor, by: Tensor
) -> Tensor:
    """Move `x_adv` by the length `by` along the gradient and project it into the ball."""
    return project(x_adv + by * steepest(gradient, norm), x, norm=norm, eps=eps)


def random_point(x: Tensor, keys: Tensor, stream: Tensor, *, norm: Norm, eps: Tensor) -> Tensor:
    """A random point in the ball around `x`: uniform for `linf`, uniform in volume for `l2`.

    `keys` and `stream`, int64 (N,), select the random numbers, see `noise`.
    """
    count = x[0].numel()
    if norm == "linf":
        offset = (2 * uniform(keys, stream, count) - 1).view_as(x)
    else:
        direction = normal(keys, 2 * stream, count).view_as(x)
        radius = uniform(keys, 2 * stream + 1, 1).view(-1, 1, 1, 1) ** (1 / count)
        offset = radius * direction / lengths(direction)
    return project(x + eps * offset, x, norm=norm, eps=eps)


def relative(alpha: float, eps: float) -> float:
    """A step size as a fraction of eps."""
    return alpha / eps if eps else 0.0


def default_alpha(eps: float, steps: int) -> float:
    """The default step size: a quarter of eps, or more if the steps could not cross the ball."""
    return min(eps, max(eps / 4, 2.5 * eps / steps))
