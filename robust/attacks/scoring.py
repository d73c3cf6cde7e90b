"""Scores iterates: their loss, whether they fool the model, and which is the best."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robust.attacks.algorithm import Algorithm
from robust.attacks.checks import check_classes
from robust.attacks.passes import ModelError, Passes
from robust.attacks.rows import Rows
from robust.geometry import column


class Scorer:
    """Scores iterates of `algorithm` and keeps the best of each run.

    Without `keep_failed` iterates that don't fool the model are not kept. With `confirm` a success
    counts only where that model is fooled too.
    """

    def __init__(
        self,
        algorithm: Algorithm[Any],
        y: Tensor,
        target: Tensor | None,
        *,
        keep_failed: bool,
        confirm: Passes | None,
    ) -> None:
        self._algorithm, self._y, self._target = algorithm, y, target
        self._keep_failed, self._confirm = keep_failed, confirm
        self._classes = 0  # unknown before the first logits

    def loss(self, logits: Tensor, rows: Rows[Any]) -> Tensor:
        """The loss to maximize, (N,). Raises ValueError and ModelError as `check_logits` does."""
        self.check_logits(logits)
        return self._algorithm.loss(logits, rows)

    def check_logits(self, logits: Tensor) -> None:
        """Raise ValueError for a label without a logit, ModelError if the number of logits changes.

        Called before any indexing, as an index out of range on a GPU kills the process.
        """
        found = logits.shape[1]
        if found == self._classes:
            return
        if self._classes:
            raise ModelError(f"expected logits of {self._classes} classes again, got {found}")
        self._classes = found
        check_classes(found, self._y, self._target)

    def keep_best(self, rows: Rows[Any], logits: Tensor, loss: Tensor) -> None:
        """Keep `x_adv` where it is better: fooling before not fooling, then the higher score."""
        score = self._algorithm.score(rows, logits, loss)
        if score is not loss:
            score = score.masked_fill(loss.isnan(), -torch.inf)
        score = score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        fools = self._fools(rows, logits) & (score > -torch.inf)
        first = rows.forwards == 1
        if self._confirm is not None and bool(fools.any()):
            rows.forwards = rows.forwards + fools
            checked = rows.take(fools)
            fools[fools.clone()] = self._fools(checked, self._confirm.logits(checked.x_adv))
        was, top = rows.fooled, rows.best_score
        better = (fools & ~was) | ((fools == was) & (score > top))
        seen = better | first  # the first logits are kept if no iterate is ever better
        rows.fools = fools
        if rows.best_logits is None:
            rows.best_logits = logits.clone()
        elif bool(seen.any()):
            rows.best_logits = torch.where(seen.unsqueeze(1), logits, rows.best_logits)
        else:
            return
        rows.best_score = torch.where(better, score, top)
        rows.fooled = was | fools
        taken = better if self._keep_failed else better & fools
        if bool(taken.any()):
            rows.best_x = torch.where(column(taken), rows.x_adv, rows.best_x)

    def _fools(self, rows: Rows[Any], logits: Tensor) -> Tensor:
        predicted = logits.argmax(dim=1)
        return predicted != rows.y if self._target is None else predicted == rows.target
