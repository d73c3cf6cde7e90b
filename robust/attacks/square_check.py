"""Square attack, run in full only if its first queries do better than gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from robust.attacks.pgd import ascend
from robust.attacks.rows import Rows
from robust.attacks.square import Square, SquareState

ASCENT = 10  # gradient steps on the margin that Square's first queries are compared with
ALPHA = 0.25  # step size as a fraction of eps
QUERIES = 100  # queries of Square, after which the run ends if gradients did better


@dataclass(kw_only=True)
class SquareCheckState(SquareState):
    """Columns of `SquareCheck`."""

    iteration: Tensor  # int64 (N,): gradient steps made
    loss_gradient: Tensor  # float32 (N,): the highest margin they reached


@dataclass(frozen=True, kw_only=True)
class SquareCheck(Square):
    """A cheap check of each image for masked gradients, and the full Square if it fails.

    First come `ASCENT` gradient steps on the margin, then Square. If the network's gradients are
    sound, random search is far behind after `QUERIES` queries, and the run ends. If random search
    does at least as well, the gradients mislead, and the run continues to all `steps` queries.
    """

    uses_gradient: ClassVar[bool] = True

    @property
    def cost(self) -> int:
        return self.runs * (2 * ASCENT + self.steps + 1)

    @property
    def usual_cost(self) -> int:
        return self.runs * (2 * ASCENT + min(QUERIES, self.steps) + 1)

    def begin(self, rows: Rows[Any]) -> SquareCheckState:
        state = super().begin(rows)
        rows.x_adv = rows.x
        return SquareCheckState(
            **vars(state),
            iteration=torch.zeros_like(rows.y),
            loss_gradient=torch.full_like(state.loss_top, -torch.inf),
        )

    def needs_gradient(self, rows: Rows[Any]) -> Tensor:
        iteration: Tensor = rows.state.iteration
        return iteration < ASCENT

    def advance(
        self, rows: Rows[Any], logits: Tensor, loss: Tensor, gradient: Tensor | None
    ) -> Tensor:
        state: SquareCheckState = rows.state
        if gradient is None:
            done = super().advance(rows, logits, loss, None)
            # `query` counts the queries after the starting point.
            return done | ((state.query > QUERIES) & (state.loss_top < state.loss_gradient))
        state.loss_gradient = torch.maximum(state.loss_gradient, loss)
        state.iteration = state.iteration + 1
        stepped = ascend(
            rows.x_adv, gradient, x=rows.x, norm=self.norm, eps=rows.eps, by=ALPHA * rows.eps
        )
        # Until the first query of Square, `x_top` is its starting point.
        last = (state.iteration == ASCENT).view(-1, 1, 1, 1)
        rows.x_adv = torch.where(last, state.x_top, stepped)
        return torch.zeros_like(rows.fooled)
