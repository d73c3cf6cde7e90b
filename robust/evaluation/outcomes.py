"""What happened to each image under one attack, and what that comes to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robust.attacks import AttackSettings
from robust.evaluation.journal import Row
from robust.evaluation.result import MAX_CONFUSION, Accuracy, Distances, StageAccuracy

BLOCK = 50  # images whose results are shown together
_COLUMNS = (
    "through",
    "fooled",
    "attacked",
    "unheld",
    "predicted",
    "distance",
    "forwards",
    "backwards",
)


class Outcomes:
    """One row for each of n images under one attack (`settings` None: clean), on the CPU."""

    def __init__(
        self,
        settings: AttackSettings | None,
        labels: Tensor,
        *,
        num_classes: int,
        batch_size: int,
    ) -> None:
        n = len(labels)
        self.settings, self.labels, self.num_classes = settings, labels, num_classes
        self.block = min(batch_size, BLOCK)
        self.through = torch.zeros(n, dtype=torch.bool)  # with the first stage
        self.fooled = torch.zeros(n, dtype=torch.bool)  # or wrong as it came
        self.attacked = torch.zeros(n, dtype=torch.bool)
        self.unheld = torch.zeros(n, dtype=torch.bool)
        self.predicted = labels.clone()
        self.distance = torch.zeros(n)
        self.forwards = torch.zeros(n, dtype=torch.int64)
        self.backwards = torch.zeros(n, dtype=torch.int64)
        self.stages: list[StageAccuracy] = []
        self.seconds = 0.0

    def start_from(self, clean: Outcomes) -> None:
        """Take over what is wrong as it came: it is not attacked."""
        self.fooled |= clean.fooled
        self.through |= clean.fooled
        self.predicted = torch.where(clean.fooled, clean.predicted, self.predicted)

    def share(self, single_step: Outcomes) -> None:
        """Take the clean predictions from an attack whose first pass is at the clean images."""
        self.through = single_step.through.clone()
        self.fooled = single_step.fooled & (single_step.distance == 0)
        self.predicted = torch.where(self.fooled, single_step.predicted, self.labels)
        self.forwards = self.through.long()
        single_step.attacked &= ~self.fooled

    def take(self, rows: Sequence[Row]) -> None:
        """Add images that are through with a stage."""
        if not rows:
            return
        columns = [torch.tensor(column) for column in zip(*rows, strict=True)]
        at, fooled = columns[0].long(), columns[1].bool()
        self.through[at] = True
        self.attacked[at] = True
        self.fooled[at] |= fooled
        self.predicted[at] = columns[2].long()
        self.distance[at] = columns[3].float()
        self.unheld[at] |= columns[4].bool()
        self.forwards[at] += columns[5].long()
        self.backwards[at] += columns[6].long()

    def join(self, shares: Sequence[Outcomes]) -> None:
        """Take over shares of which the r-th has every image of place r, r + W, and so on."""
        for rank, share in enumerate(shares):
            for name in _COLUMNS:
                getattr(self, name)[rank :: len(shares)] = getattr(share, name)
        self.stages = [
            StageAccuracy(
                attack=parts[0].attack,
                attacked=sum(part.attacked for part in parts),
                correct=sum(part.correct for part in parts),
                seconds=max(part.seconds for part in parts),
            )
            for parts in zip(*(share.stages for share in shares), strict=True)
        ]
        self.seconds = max(share.seconds for share in shares)

    @property
    def seen(self) -> int:
        """How many images, from the first on in whole blocks, are through: an unbiased sample.

        Those through at any moment are not, as the easily fooled are through first; and those
        before the first gap end with such as were easily fooled.
        """
        gaps = (~self.through).nonzero()
        return int(gaps[0]) // self.block * self.block if len(gaps) else len(self.through)

    def accuracy(self) -> Accuracy:
        """Over the images seen so far."""
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
            unheld=int((self.unheld & ~self.fooled).sum()),
            seconds=self.seconds,
        )

    def _distances(self, n: int) -> Distances | None:
        if self.settings is None:
            return None
        found = self.distance[:n][self.attacked[:n] & self.fooled[:n]]
        if not len(found):
            return None
        return Distances(
            least=float(found.min()), median=float(found.median()), most=float(found.max())
        )
