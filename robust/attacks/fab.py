"""Fast adaptive boundary attack: the closest point on the decision boundary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.attacks.algorithm import Algorithm
from robust.attacks.checks import check_counts
from robust.attacks.losses import logit_gap
from robust.attacks.rows import Rows, Table
from robust.attacks.targets import nth_likeliest
from robust.choices import Norm
from robust.geometry import column, distance, lengths

ALPHA_MAX = 0.1  # largest pull back towards the image
ETA = 1.05  # how far a step overshoots the boundary
BETA = 0.9  # how far a point beyond the boundary goes back


@dataclass(kw_only=True)
class FABState(Table):
    """Columns of `FAB`."""

    iteration: Tensor  # int64 (N,): steps taken
    landed: Tensor  # bool (N,): whether x_adv is the end of a step that is not scored yet
    expect_short: Tensor  # bool (N,): whether that step is expected to end short of the boundary


@dataclass(frozen=True, kw_only=True)
class FAB(Algorithm[FABState]):
    """Steps to the linearized boundary with one class after another; see `robust.attacks.fab_t`.

    A step needs the gradient at its start, but only the logits at its end. If it ends short of the
    boundary, the next step starts there and needs the gradient, so both are computed in one query.
    Whether a step will end short is predicted from the previous step.
    """

    needs_clean_logits: ClassVar[bool] = True
    allow_parallel_runs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, targets=self.runs)

    @property
    def cost(self) -> int:
        # A step takes three passes, or four if it was expected to end short of the boundary and did
        # not. The next step is then expected to end beyond, so at most every second takes four.
        return 1 + self.runs * (3 * self.steps + self.steps // 2)

    def begin(self, rows: Rows[FABState]) -> FABState:
        assert rows.clean_logits is not None
        rows.target = nth_likeliest(rows.clean_logits, rows.y, rows.run)
        never = torch.zeros_like(rows.fooled)
        return FABState(iteration=torch.zeros_like(rows.y), landed=never, expect_short=~never)

    def needs_gradient(self, rows: Rows[FABState]) -> Tensor:
        state = rows.state
        return (state.iteration < self.steps) & (~state.landed | state.expect_short)

    def loss(self, logits: Tensor, rows: Rows[FABState]) -> Tensor:
        return logit_gap(logits, rows.y, rows.target)

    def score(self, rows: Rows[FABState], logits: Tensor, loss: Tensor) -> Tensor:
        """Closer to the image is better; points beyond eps are invalid."""
        away = distance(rows.x_adv, rows.x, self.norm)
        return torch.where(away <= rows.eps.flatten(), -away, -torch.inf)

    def advance(
        self, rows: Rows[FABState], logits: Tensor, loss: Tensor, gradient: Tensor | None
    ) -> Tensor:
        x_adv, state = rows.x_adv, rows.state
        landed = state.landed
        beyond = landed & (logits.argmax(dim=1) != rows.y)
        done = landed & (state.iteration >= self.steps)
        back = torch.lerp(rows.x, x_adv, BETA)
        rows.x_adv = torch.where(column(beyond), back, x_adv)
        state.expect_short = torch.where(landed, ~beyond, state.expect_short)
        if gradient is None:
            state.landed = torch.zeros_like(landed)
            return done
        goes = ~beyond & ~done
        stepped = self._step(rows, x_adv, loss, gradient)
        rows.x_adv = torch.where(column(goes), stepped, rows.x_adv)
        state.iteration = state.iteration + goes
        state.landed = goes
        return done

    def _step(self, rows: Rows[FABState], x_adv: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        """A point past the linearized boundary, biased towards the image."""
        x, gradient = rows.x, gradient.nan_to_num()  # no direction for NaN, as in `steepest`
        gap = -loss  # how far the linear model is from the target at x_adv; at x it is this plus
        so_far = torch.linalg.vecdot(gradient.flatten(1), (x_adv - x).flatten(1))
        step_from = hyperplane(gradient, self.norm)
        from_here, from_x = step_from(x_adv, gap), step_from(x, gap + so_far)
        near = lengths(from_here, self.norm).clamp_min(1e-8)
        far = lengths(from_x, self.norm).clamp_min(1e-8)
        weight = (near / (near + far)).clamp_max(ALPHA_MAX)
        ahead = torch.add(x_adv, from_here, alpha=ETA)
        return ahead.lerp_(torch.add(x, from_x, alpha=ETA), weight).clamp_(0, 1)


def hyperplane(w: Tensor, norm: Norm) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of `x` and `gap` to the shortest step d with <w, d> = gap and x + d in [0, 1].

    If there is none, the step to the corner of the pixel box that comes closest; lengths are in
    `norm`. `x` and `w` are float32 (N, C, H, W), `gap` is float32 (N,).

    Each pixel moves by t under `linf`, by t * w under `l2`, until it reaches 0 or 1. The gain
    <w, d> is concave and piecewise linear in t, so Newton's method from t = 0 never overshoots and
    needs few iterations.
    """
    largest = lengths(w, "linf").clamp_min(1e-30)  # else squares could underflow
    scaled = (w / largest).flatten(1)
    weight, sign, end = scaled.abs(), scaled.sign(), (scaled > 0).float()
    yields = weight if norm == "linf" else weight.square()

    def step_from(x: Tensor, gap: Tensor) -> Tensor:
        want, other_end = gap.abs() / largest.flatten(), (gap < 0).float().unsqueeze(1)
        room = (end - other_end).abs_().sub_(x.flatten(1)).abs_()
        limit = room if norm == "linf" else room / weight.clamp_min(1e-30)
        t, lacking = torch.zeros_like(want), want
        for _ in range(50):
            slope = torch.linalg.vecdot(yields, (limit > t.unsqueeze(1)).float())
            short = lacking > 1e-6 * want
            if not bool((short & (slope > 0)).any()):
                break
            t = t + torch.where(short & (slope > 0), lacking / slope, 0.0)
            lacking = want - torch.linalg.vecdot(yields, torch.minimum(limit, t.unsqueeze(1)))
        moved = t.unsqueeze(1) if norm == "linf" else t.unsqueeze(1) * weight
        moved = torch.minimum(moved, room).mul_(sign).mul_(gap.sign().unsqueeze(1))
        return moved.view_as(w)

    return step_from
