"""Per-image results of one attack, and the resulting accuracy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robust.attacks import AttackSettings
from robust.evaluation.journal import Row
from robust.evaluation.result import MAX_CONFUSION, Accuracy, Distances, StageAccuracy

BLOCK = 50  # images per block; results so far cover whole blocks
_COLUMNS = (
    "finished",
    "fooled",
    "attacked",
    "unconfirmed",
    "predicted",
    "distance",
    "forwards",
    "backwards",
)


class Outcomes:
    """The results of n images under one attack (`settings` None: clean), on the CPU.

    `positions` int64 (n,) are the indices of the images in the call of the evaluation; by default
    0 to n - 1.
    """

    def __init__(
        self,
        settings: AttackSettings | None,
        labels: Tensor,
        *,
        positions: Tensor | None = None,
        num_classes: int,
        batch_size: int,
    ) -> None:
        n = len(labels)
        self.positions = torch.arange(n) if positions is None else positions
        self.settings, self.labels, self.num_classes = settings, labels, num_classes
        self.block = min(batch_size, BLOCK)
        self.finished = torch.zeros(n, dtype=torch.bool)  # whether the first stage is finished
        self.fooled = torch.zeros(n, dtype=torch.bool)  # or misclassified before the attack
        self.attacked = torch.zeros(n, dtype=torch.bool)
        self.unconfirmed = torch.zeros(n, dtype=torch.bool)
        self.predicted = labels.clone()
        self.distance = torch.zeros(n)
        self.forwards = torch.zeros(n, dtype=torch.int64)
        self.backwards = torch.zeros(n, dtype=torch.int64)
        self.stages: list[StageAccuracy] = []
        self.seconds = 0.0

    def start_from(self, clean: Outcomes) -> None:
        """Mark the misclassified images of `clean`, which are not attacked."""
        self.fooled |= clean.fooled
        self.finished |= clean.fooled
        self.predicted = torch.where(clean.fooled, clean.predicted, self.predicted)

    def add_rows(self, rows: Sequence[Row]) -> None:
        """Add the results of images that have finished a stage."""
        if not rows:
            return
        columns = [torch.tensor(column) for column in zip(*rows, strict=True)]
        at, fooled = columns[0].long(), columns[1].bool()
        self.finished[at] = True
        self.attacked[at] = True
        self.fooled[at] |= fooled
        self.predicted[at] = columns[2].long()
        self.distance[at] = columns[3].float()
        self.unconfirmed[at] |= columns[4].bool()
        self.forwards[at] += columns[5].long()
        self.backwards[at] += columns[6].long()

    def merge(self, shards: Sequence[Outcomes]) -> None:
        """Merge the shards of W processes; the r-th has the images r, r + W, and so on."""
        for rank, shard in enumerate(shards):
            for name in _COLUMNS:
                getattr(self, name)[rank :: len(shards)] = getattr(shard, name)
        self.stages = [
            StageAccuracy(
                attack=parts[0].attack,
                attacked=sum(part.attacked for part in parts),
                correct=sum(part.correct for part in parts),
                seconds=max(part.seconds for part in parts),
            )
            for parts in zip(*(shard.stages for shard in shards), strict=True)
        ]
        self.seconds = max(shard.seconds for shard in shards)

    @property
    def seen(self) -> int:
        """Number of leading images, in whole blocks, that are all finished: an unbiased sample.

        All images finished so far would be a biased sample, since easily fooled ones finish first;
        so would all images before the first unfinished one.
        """
        gaps = (~self.finished).nonzero()
        return int(gaps[0]) // self.block * self.block if len(gaps) else len(self.finished)

    def accuracy(self) -> Accuracy:
        """The accuracy over the images seen so far."""
        n = self.seen
        labels, right = self.labels[:n], ~self.fooled[:n]
        k = self.num_classes
        confusion: tuple[tuple[int, ...], ...] = ()
        if k <= MAX_CONFUSION:
            pairs = (labels * k + self.predicted[:n]).bincount(minlength=k * k)
            confusion = tuple(map(tuple, pairs.view(k, k).tolist()))
        per_class = zip(
            labels[right].bincount(minlength=k).tolist(),
            labels.bincount(minlength=k).tolist(),
            strict=True,
        )
        return Accuracy(
            attack=self.settings,
            correct=int(right.sum()),
            n=n,
            per_class=tuple(per_class),
            confusion=confusion,
            distances=self._distances(n),
            stages=tuple(self.stages),
            forwards=int(self.forwards.sum()),
            backwards=int(self.backwards.sum()),
            unconfirmed=int((self.unconfirmed & ~self.fooled).sum()),
            seconds=self.seconds,
            fooled=self._fooled() if n == len(self.labels) else (),
        )

    def _fooled(self) -> tuple[int, ...]:
        if self.settings is None or not self.settings.own_stages:
            return ()
        found: list[int] = self.positions[self.fooled & self.attacked].sort().values.tolist()
        return tuple(found)

    def _distances(self, n: int) -> Distances | None:
        if self.settings is None:
            return None
        found = self.distance[:n][self.attacked[:n] & self.fooled[:n]]
        if not len(found):
            return None
        return Distances(
            least=float(found.min()), median=float(found.median()), most=float(found.max())
        )
