"""The smallest eps that fools a model, image by image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from robust.attacks.algorithm import Algorithm
from robust.attacks.checks import check_counts
from robust.attacks.eight_bit import adjacent, middle_radius, snap, whole_levels
from robust.attacks.losses import margin
from robust.attacks.pgd import ascend, default_alpha, random_point
from robust.attacks.rows import Rows, Table
from robust.geometry import column, distance

ROUNDS = 10  # bisections, which give eps to a thousandth of its maximum


@dataclass(kw_only=True)
class MinimalState(Table):
    """Columns of `Minimal`."""

    round: Tensor  # int64 (N,): 0 at the full eps, then the rounds of bisection
    restart: Tensor  # int64 (N,): the restart within this round
    iteration: Tensor  # int64 (N,): steps taken since the restart
    radius: Tensor  # float32 (N,): radius of the ball in this round
    low: Tensor  # float32 (N,): the largest radius at which a round failed
    point: Tensor  # float32 (N, C, H, W): where PGD is, which `x_adv` rounds for 8-bit results


@dataclass(frozen=True, kw_only=True)
class Minimal(Algorithm[MinimalState]):
    """PGD on the margin in smaller and smaller balls; see `robust.attacks.minimal`.

    A round is PGD at one radius, with `restarts`: the first from the image, the others from random
    points. It ends at its first success.
    """

    early_stop: bool = field(default=False, init=False)  # a smaller eps may fool the model too
    restarts: int = 1
    rounds: int = ROUNDS
    eight_bit: bool = False  # whether every point that is tried is an 8-bit image, as `x` is

    needs_float32: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, restarts=self.restarts)
        if self.rounds < 0:
            raise ValueError(f"expected rounds as a whole number of at least 0, got {self.rounds}")

    @property
    def cost(self) -> int:
        return (1 + self.rounds) * self.restarts * (2 * self.steps + 1)

    def begin(self, rows: Rows[MinimalState]) -> MinimalState:
        zeros, radius = torch.zeros_like(rows.y), rows.eps.flatten()
        if self.eight_bit and self.norm == "linf":
            radius = whole_levels(radius) / 255
        return MinimalState(
            round=zeros,
            restart=zeros,
            iteration=zeros,
            radius=radius,
            low=torch.zeros_like(radius),
            point=rows.x,
        )

    def needs_gradient(self, rows: Rows[MinimalState]) -> Tensor:
        return rows.state.iteration < self.steps

    def loss(self, logits: Tensor, rows: Rows[MinimalState]) -> Tensor:
        return margin(logits, rows.y, rows.target if self.targeted else None)

    def score(self, rows: Rows[MinimalState], logits: Tensor, loss: Tensor) -> Tensor:
        """Closer is better among points that fool the model; otherwise a higher loss is."""
        predicted = logits.argmax(dim=1)
        fools = predicted == rows.target if self.targeted else predicted != rows.y
        return torch.where(fools, -distance(rows.x_adv, rows.x, self.norm), loss)

    def advance(
        self, rows: Rows[MinimalState], logits: Tensor, loss: Tensor, gradient: Tensor | None
    ) -> Tensor:
        state = rows.state
        if gradient is not None:
            radius = column(state.radius)
            state.point = ascend(
                state.point,
                gradient,
                x=rows.x,
                norm=self.norm,
                eps=radius,
                by=default_alpha(1.0, self.steps) * radius,
            )
            state.iteration = state.iteration + 1
            failed = torch.zeros_like(rows.fools)
        else:
            failed = ~rows.fools
            state.restart = state.restart + failed
            again = failed & (state.restart < self.restarts)
            if bool(again.any()):
                self._restart(rows, again)
            failed = failed & ~again
        done = self._next_round(rows, failed)
        rows.x_adv = self._tried(rows)
        return done

    def _tried(self, rows: Rows[MinimalState]) -> Tensor:
        """The images to score at the points of the rows."""
        state = rows.state
        if not self.eight_bit:
            return state.point
        return snap(state.point, rows.x, norm=self.norm, radius=state.radius)

    def _restart(self, rows: Rows[MinimalState], again: Tensor) -> None:
        state = rows.state
        start = random_point(
            rows.x, rows.key, state.restart, norm=self.norm, eps=column(state.radius)
        )
        state.point = torch.where(column(again), start, state.point)
        state.iteration = torch.where(again, 0, state.iteration)

    def _next_round(self, rows: Rows[MinimalState], failed: Tensor) -> Tensor:
        """Halve the interval of runs whose round has ended; returns which runs are done."""
        state = rows.state
        over = failed | rows.fools
        if not bool(over.any()):
            return over
        state.low = torch.where(failed, state.radius, state.low)
        high = torch.where(rows.fooled, -rows.best_score, state.radius)
        state.round = state.round + over
        if self.eight_bit:
            closed = adjacent(state.low, high, self.norm)
            radius = middle_radius(state.low, high, self.norm)
        else:
            closed, radius = high <= state.low, (state.low + high) / 2
        done = over & (~rows.fooled | (state.round > self.rounds) | closed)
        state.radius = torch.where(over, radius, state.radius)
        state.restart = torch.where(over, 0, state.restart)
        state.iteration = torch.where(over, 0, state.iteration)
        state.point = torch.where(column(over), rows.x, state.point)
        return done
