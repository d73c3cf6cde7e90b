"""Auto-PGD: projected gradient descent with an adaptive step size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from robust.attacks.algorithm import Algorithm
from robust.attacks.checks import check_counts
from robust.attacks.losses import FUNCTIONS, Loss, check_loss, classes_needed, targeted_dlr
from robust.attacks.noise import normal, uniform
from robust.attacks.rows import Rows, Table
from robust.attacks.targets import nth_likeliest
from robust.choices import Norm
from robust.geometry import column, lengths, projection, steepest

RHO = 0.75  # fraction of steps that must raise the loss to keep the step size
MOMENTUM = 0.75


@dataclass(kw_only=True)
class APGDState(Table):
    """Columns of `APGD`."""

    iteration: Tensor  # int64 (N,): steps taken
    rises: Tensor  # int64 (N,): steps since the last check that raised the loss
    step_size: Tensor  # float32 (N, 1, 1, 1)
    x_old: Tensor  # float32 (N, C, H, W): the previous iterate
    x_top: Tensor  # float32 (N, C, H, W): the iterate of the highest loss
    gradient_top: Tensor  # float32 (N, C, H, W): the gradient there
    loss_old: Tensor  # float32 (N,): loss of the previous iterate
    loss_top: Tensor  # float32 (N,): the highest loss
    loss_checked: Tensor  # float32 (N,): the highest loss at the last check
    halved: Tensor  # bool (N,): whether the last check halved the step size


@dataclass(frozen=True, kw_only=True)
class APGD(Algorithm[APGDState]):
    """PGD that halves its step size when progress stalls; see `robust.attacks.apgd`."""

    loss_name: Loss = "ce"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self.loss_name)

    @classmethod
    def default_alpha(cls, eps: float, steps: int) -> float:
        return 2 * eps  # the first step's

    def begin(self, rows: Rows[APGDState]) -> APGDState:
        state = self.fresh(rows, rows.run)
        rows.x_adv = state.x_old
        return state

    def fresh(self, rows: Rows[Any], stream: Tensor) -> APGDState:
        """The state of runs that start at `x_old`, a random point of the `stream`, int64 (N,)."""
        zeros = torch.zeros_like(rows.y)
        start = random_surface(rows.x, rows.key, stream, norm=self.norm, eps=rows.eps)
        unknown = torch.full_like(rows.eps.flatten(), -torch.inf)
        return APGDState(
            iteration=zeros,
            rises=zeros,
            step_size=2 * rows.eps,
            x_old=start,
            x_top=start,
            gradient_top=torch.zeros_like(start),
            loss_old=torch.zeros_like(unknown),
            loss_top=unknown,
            loss_checked=unknown,
            halved=torch.ones_like(zeros, dtype=torch.bool),
        )

    def needs_gradient(self, rows: Rows[APGDState]) -> Tensor:
        return rows.state.iteration < self.steps

    def loss(self, logits: Tensor, rows: Rows[APGDState]) -> Tensor:
        needed = classes_needed(self.loss_name, targeted=self.targeted)
        if logits.shape[1] < needed:
            raise ValueError(
                f"expected at least {needed} classes for the loss {self.loss_name}, "
                f"got {logits.shape[1]}; use ce or margin"
            )
        return FUNCTIONS[self.loss_name](logits, rows.y, rows.target if self.targeted else None)

    def advance(
        self, rows: Rows[APGDState], logits: Tensor, loss: Tensor, gradient: Tensor | None
    ) -> Tensor:
        if gradient is None:
            return torch.ones_like(rows.fooled)
        x_adv, state = rows.x_adv, rows.state
        first = state.iteration == 0
        # The reference counts the first step as a rise where its loss is above 0.
        state.rises = torch.where(first, 0, state.rises + (loss > state.loss_old))
        state.loss_old = torch.where(first, 0.0, loss)
        top = loss > state.loss_top
        state.x_top = torch.where(column(top), x_adv, state.x_top)
        state.gradient_top = torch.where(column(top), gradient, state.gradient_top)
        state.loss_top = torch.where(top, loss, state.loss_top)
        state.loss_checked = torch.where(first, loss, state.loss_checked)
        x_adv, gradient = self._check(state, x_adv, gradient)
        rows.x_adv = self._move(rows, x_adv, gradient)
        state.x_old = x_adv
        state.iteration = state.iteration + 1
        return torch.zeros_like(rows.fooled)

    def _check(self, state: APGDState, x_adv: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """If the step size is too large, halve it and return to the best point."""
        window = _windows(self.steps, x_adv.device)[state.iteration]
        due = window > 0
        if not bool(due.any()):
            return x_adv, gradient
        stuck = ~state.halved & (state.loss_checked >= state.loss_top)
        halve = due & ((state.rises <= RHO * window) | stuck)
        state.halved = torch.where(due, halve, state.halved)
        state.loss_checked = torch.where(due, state.loss_top, state.loss_checked)
        state.rises = torch.where(due, 0, state.rises)
        back = column(halve)
        state.step_size = torch.where(back, state.step_size / 2, state.step_size)
        return (
            torch.where(back, state.x_top, x_adv),
            torch.where(back, state.gradient_top, gradient),
        )

    def _move(self, rows: Rows[APGDState], x_adv: Tensor, gradient: Tensor) -> Tensor:
        """A step of `step_size` along the gradient, with momentum."""
        state = rows.state
        inside = projection(rows.x, norm=self.norm, eps=rows.eps)
        weight = torch.where(column(state.iteration == 0), 1.0, MOMENTUM)
        stepped = inside(steepest(gradient, self.norm).mul_(state.step_size).add_(x_adv))
        moved = stepped.sub_(x_adv).mul_(weight).add_(x_adv)
        return inside(moved.add_((x_adv - state.x_old).mul_(1 - weight)))


@dataclass(frozen=True, kw_only=True)
class TargetedAPGD(APGD):
    """Each run targets another class, the likeliest first; see `robust.attacks.apgd_t`.

    A success is any wrong class. The loss is `targeted_dlr`.
    """

    needs_clean_logits: ClassVar[bool] = True
    allow_parallel_runs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, targets=self.runs)

    def begin(self, rows: Rows[APGDState]) -> APGDState:
        assert rows.clean_logits is not None
        rows.target = nth_likeliest(rows.clean_logits, rows.y, rows.run)
        return super().begin(rows)

    def loss(self, logits: Tensor, rows: Rows[APGDState]) -> Tensor:
        return targeted_dlr(logits, rows.y, rows.target)


def random_surface(x: Tensor, keys: Tensor, stream: Tensor, *, norm: Norm, eps: Tensor) -> Tensor:
    """A random point on the surface of the ball around `x`, clipped to [0, 1].

    `keys` and `stream`, int64 (N,), select the random numbers, see `noise`.
    """
    count = x[0].numel()
    draws = 2 * uniform(keys, stream, count) - 1 if norm == "linf" else normal(keys, stream, count)
    offset = draws.view_as(x)
    return (x + eps * offset / lengths(offset, norm)).clamp(0, 1)


def checks(steps: int) -> dict[int, int]:
    """The iterations that check the step size, each with the steps since the previous check."""
    window, least = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1)
    shrink, at, found = max(int(0.03 * steps), 1), 0, {}
    while at + window <= steps:
        at += window
        found[at] = window
        window = max(window - shrink, least)
    return found


@cache
def _windows(steps: int, device: torch.device) -> Tensor:
    """The steps since the last check by iteration, int64 (steps + 1,); 0 where none is due."""
    found = checks(steps)
    return torch.tensor([found.get(step, 0) for step in range(steps + 1)], device=device)
