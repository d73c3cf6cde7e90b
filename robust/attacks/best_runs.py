"""The best finished runs of each image, and the results built from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robust.attacks.result import AttackResult
from robust.attacks.rows import Rows
from robust.choices import Norm
from robust.geometry import distance


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Images whose attack has finished: their indices, int64 (M,), and their results."""

    index: Tensor
    result: AttackResult


class BestRuns:
    """Passes spent on each of `images` images, and their best finished run."""

    def __init__(self, images: int, norm: Norm) -> None:
        self.forwards, self.backwards = (torch.zeros(images, dtype=torch.int64) for _ in range(2))
        self._norm = norm
        self._ranks: dict[int, tuple[bool, float, int]] = {}
        self._best: dict[int, tuple[Tensor, ...]] = {}

    def count(self, rows: Rows[Any]) -> None:
        """Add the passes of runs that have ended."""
        index = rows.image.cpu()
        self.forwards.index_add_(0, index, rows.forwards.cpu())
        self.backwards.index_add_(0, index, rows.backwards.cpu())

    def keep(self, image: int, rank: tuple[bool, float, int], rows: Rows[Any], place: int) -> None:
        """Keep the run at `place` if it is better than the earlier runs of `image`."""
        if image not in self._ranks or rank > self._ranks[image]:
            self._ranks[image] = rank
            self._best[image] = tuple(c[place : place + 1].clone() for c in _kept(rows))

    def take(self, images: list[int]) -> Finished:
        """The best run of each of `images`."""
        columns = zip(*(self._best.pop(image) for image in images), strict=True)
        return self._finished(torch.tensor(images), *(torch.cat(column) for column in columns))

    def of_rows(self, rows: Rows[Any]) -> Finished:
        """The runs in `rows`, each the only one of its image."""
        return self._finished(rows.image.cpu(), *_kept(rows))

    def none(self, x: Tensor, logits: Tensor) -> Finished:
        """No images, in the shapes of `x` (M, C, H, W) and `logits` (M, K)."""
        index = torch.zeros(0, dtype=torch.int64)
        success = torch.zeros(0, dtype=torch.bool, device=x.device)
        return self._finished(index, x[:0], x[:0], logits[:0], success)

    def _finished(
        self, index: Tensor, x: Tensor, x_adv: Tensor, logits: Tensor, success: Tensor
    ) -> Finished:
        return Finished(
            index=index,
            result=AttackResult(
                x_adv=x_adv,
                logits=logits,
                success=success,
                distance=distance(x_adv, x, self._norm),
                forwards=self.forwards[index].to(x.device),
                backwards=self.backwards[index].to(x.device),
            ),
        )


def _kept(rows: Rows[Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kept part of a finished run: image, best iterate, logits, and whether it fools."""
    assert rows.best_logits is not None
    return rows.x, rows.best_x, rows.best_logits, rows.fooled
