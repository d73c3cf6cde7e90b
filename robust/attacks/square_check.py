"""Square attack, run in full only if its first queries do better than gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from robust.attacks.pgd import ascend
from robust.attacks.rows import Rows
from robust.attacks.square import Square, SquareState

# Points of gradient ascent on the margin, from the image on, that Square is compared with. The last
# one's gradient is not used.
ASCENT = 10
ALPHA = 0.25  # step size as a fraction of eps
QUERIES = 100  # queries of Square, after which the run ends if gradients did better


@dataclass(kw_only=True)
class SquareCheckState(SquareState):
    """Columns of `SquareCheck`."""

    iteration: Tensor  # int64 (N,): points of the ascent that are scored
    loss_start: Tensor  # float32 (N,): the margin of the image
    loss_gradient: Tensor  # float32 (N,): the highest margin of those points


@dataclass(frozen=True, kw_only=True)
class SquareCheck(Square):
    """A cheap check of each image for masked gradients, and the full Square if it fails.

    First come the image and `ASCENT` - 1 gradient steps on the margin, then Square. If gradients
    are sound, they raise the margin, random search is far behind after `QUERIES` queries, and the
    run ends. If no step raises the margin, or random search does at least as well, the gradients
    mislead, and the run continues to all `steps` queries.
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
            loss_start=torch.zeros_like(state.loss_top),
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
            sound = state.loss_gradient > torch.maximum(state.loss_start, state.loss_top)
            # `query` counts the queries after the starting point.
            return done | ((state.query > QUERIES) & sound)
        state.loss_start = torch.where(state.iteration == 0, loss, state.loss_start)
        state.loss_gradient = torch.maximum(state.loss_gradient, loss)
        state.iteration = state.iteration + 1
        stepped = ascend(
            rows.x_adv, gradient, x=rows.x, norm=self.norm, eps=rows.eps, by=ALPHA * rows.eps
        )
        # Until the first query of Square, `x_top` is its starting point.
        last = (state.iteration == ASCENT).view(-1, 1, 1, 1)
        rows.x_adv = torch.where(last, state.x_top, stepped)
        return torch.zeros_like(rows.fooled)
