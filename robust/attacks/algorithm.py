"""The base class of attacks, which take a run from one query of the model to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Generic

import torch
from torch import Tensor

from robust.attacks.checks import check_counts
from robust.attacks.rows import Rows, S
from robust.choices import Norm


@dataclass(frozen=True, kw_only=True)
class Algorithm(Generic[S]):
    """One attack. A subclass defines `begin`, `loss` and `advance`; the rest has defaults.

    For each query the search scores `rows.x_adv`, computes the gradient of `loss` for the rows that
    `needs_gradient` selects, and calls `advance`, which returns the runs that are done. Runs are
    independent: rows of one batch may be at different iterations, and no result depends on
    another row. Raises ValueError for counts below 1.
    """

    norm: Norm  # how distance is measured
    steps: int  # iterations or queries of each run
    runs: int = 1  # restarts or targets, in turn until one fools the model
    early_stop: bool = True  # whether an image is finished at its first success
    targeted: bool = False  # whether to attack toward `rows.target` instead of away from `rows.y`

    uses_gradient: ClassVar[bool] = True  # whether it needs gradients at all
    needs_clean_logits: ClassVar[bool] = False  # whether `begin` reads `rows.clean_logits`
    needs_float32: ClassVar[bool] = False  # whether it ends right at the decision boundary
    # Whether a run may start before the previous one has failed, to fill a batch.
    allow_parallel_runs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, restarts=self.runs)

    @classmethod
    def default_alpha(cls, eps: float, steps: int) -> float:
        """Default step size in pixel units; 0 for attacks without a fixed step."""
        return 0.0

    @property
    def cost(self) -> int:
        """Maximum passes per image, forward plus backward."""
        per_step = 2 if self.uses_gradient else 1
        return self.needs_clean_logits + self.runs * (per_step * self.steps + 1)

    @property
    def usual_cost(self) -> int:
        """Maximum passes per image on a model without masked gradients."""
        return self.cost

    def begin(self, rows: Rows[S]) -> S:
        """Set the first `x_adv` of new rows and return their state."""
        raise NotImplementedError

    def loss(self, logits: Tensor, rows: Rows[S]) -> Tensor:
        """The per-image loss to maximize, (N,), differentiable."""
        raise NotImplementedError

    def advance(
        self, rows: Rows[S], logits: Tensor, loss: Tensor, gradient: Tensor | None
    ) -> Tensor:
        """Set the next `x_adv`; returns which rows are done, bool (N,)."""
        raise NotImplementedError

    def needs_gradient(self, rows: Rows[S]) -> Tensor:
        """Which rows need the gradient at `x_adv`, bool (N,); the others need only logits."""
        return torch.full_like(rows.fooled, self.uses_gradient)

    def score(self, rows: Rows[S], logits: Tensor, loss: Tensor) -> Tensor:
        """Score of `x_adv`, (N,), that ranks iterates of equal success; -inf if it is invalid."""
        return loss

    def speculate(self, rows: Rows[S], count: int) -> list[Tensor]:
        """Guesses of `x_adv` for the next queries, at most `count`, to batch with this one."""
        return []
