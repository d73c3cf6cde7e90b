"""Reports on a run: progress, held-out accuracies, warnings, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust import files
from training.recipe import Phase

COLLAPSE_GAP = 0.15  # FGSM accuracy minus PGD-10 accuracy that means collapse
OVERFIT_DROP = 0.03  # drop from the best PGD-10 accuracy that means robust overfitting
PATIENCE = 3  # consecutive scores with that drop


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress after a step, for a display."""

    phase: Phase
    epoch: int  # from 1, over all phases
    epochs: int
    step: int  # from 1, within the epoch
    steps: int
    loss: float  # mean over the epoch so far; on a GPU some steps old
    learning_rate: float
    images_per_second: float
    seconds_left: float  # of the whole run without scoring; infinite before the first step
    row: dict[str, Any] | None = None  # the epoch's metrics, once it is over


Observer = Callable[[Progress], None]


class SpeedMeter:
    """Training speed of an epoch."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size, self.steps, self.began = batch_size, 0, time.monotonic()

    @property
    def images_per_second(self) -> float:
        """Images per second since the epoch began or was resumed."""
        return self.steps * self.batch_size / (time.monotonic() - self.began)


def warnings_for(history: list[dict[str, Any]]) -> list[str]:
    """Warnings about the newest epoch; none unless it was scored."""
    adversarial = [row for row in history if row["adversarial"] and row["n"]]
    if not adversarial or history[-1] is not adversarial[-1]:
        return []
    last, found = adversarial[-1], []
    gap = last["fgsm"] - last["pgd"]
    if gap > COLLAPSE_GAP:
        found.append(
            f"collapse: FGSM accuracy is {100 * gap:.1f} points above PGD-10's, so the model "
            "defends against single steps only; use n-fgsm or pgd, or a lower learning rate"
        )
    best = max(row["pgd"] for row in adversarial)
    tail = adversarial[-PATIENCE:]
    if len(tail) == PATIENCE and all(best - row["pgd"] > OVERFIT_DROP for row in tail):
        found.append(
            f"robust overfitting: PGD-10 accuracy has been over {100 * OVERFIT_DROP:.0f} points "
            f"below its best ({100 * best:.1f}%) for {PATIENCE} scores; train for fewer epochs, or "
            "augment more"
        )
    return found


def write_metrics(path: Path, history: list[dict[str, Any]]) -> None:
    """Write the whole history, one JSON line an epoch, atomically. Raises OSError."""
    text = "".join(json.dumps(row) + "\n" for row in history)
    files.write_bytes(path, text.encode())


class Board(AbstractContextManager["Board"]):
    """TensorBoard's event files of a run."""

    def __init__(self, folder: Path, *, done: int) -> None:
        # Imported here because it is slow to import.
        from torch.utils.tensorboard import SummaryWriter

        # Later events were written by a run that was killed before it saved its state.
        self._writer = SummaryWriter(str(folder), purge_step=done + 1)

    def add(self, row: dict[str, Any]) -> None:
        """Add a point for each metric of an epoch."""
        for name in ("loss", "learning_rate", "clean", "fgsm", "pgd", "images_per_second"):
            if row[name] is None:  # an epoch that was not scored
                continue
            self._writer.add_scalar(name, row[name], row["epoch"])
        self._writer.flush()

    def __exit__(self, *exception: object) -> None:
        self._writer.close()
