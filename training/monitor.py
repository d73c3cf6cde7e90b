"""What a run reports: held-out accuracies, warnings, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust import files
from robust.attacks import resolve_attack
from robust.evaluation import evaluate
from robust.ranks import ALONE, Ranks
from robust.threat_model import ThreatModel

logger = logging.getLogger(__name__)

COLLAPSE_GAP = 0.15  # FGSM accuracy minus PGD-10 accuracy
OVERFIT_DROP = 0.03  # below the best PGD-10 accuracy so far
PATIENCE = 3  # epochs in a row below it


def score(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    threat_model: ThreatModel,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Clean, FGSM and PGD-10 accuracy, in [0, 1], of a model in eval mode and float32."""
    attacks = [resolve_attack("fgsm", threat_model), resolve_attack("pgd-10", threat_model)]
    result = evaluate(
        model,
        images,
        labels,
        num_classes=num_classes,
        attacks=attacks,
        device=device,
        batch_size=250 if device.type == "cpu" else 1000,
        ranks=ranks,
    )
    return {
        "clean": result.accuracy("clean"),
        "fgsm": result.accuracy("fgsm"),
        "pgd": result.accuracy("pgd-10"),
    }


def warnings_for(history: list[dict[str, Any]]) -> list[str]:
    """What the newest epoch gives reason to warn of."""
    adversarial = [row for row in history if row["adversarial"]]
    if not adversarial or not history[-1]["adversarial"]:
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
            f"below its best ({100 * best:.1f}%) for {PATIENCE} epochs; train for fewer, or "
            "augment more"
        )
    return found


def write_metrics(path: Path, history: list[dict[str, Any]]) -> None:
    """Write the whole history, one JSON line an epoch, atomically. Raises OSError."""
    text = "".join(json.dumps(row) + "\n" for row in history)
    files.write_atomic(path, lambda file: file.write(text.encode()))


class Board:
    """TensorBoard's event files of a run."""

    def __init__(self, folder: Path, *, done: int) -> None:
        # Slow to import, and only training needs it.
        from torch.utils.tensorboard import SummaryWriter

        # Events past `done` were written by a run that was killed before it saved its state.
        self._writer = SummaryWriter(str(folder), purge_step=done + 1)

    def add(self, row: dict[str, Any]) -> None:
        """One point for each number of an epoch."""
        for name in ("loss", "learning_rate", "clean", "fgsm", "pgd", "images_per_second"):
            self._writer.add_scalar(name, row[name], row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Finish the files."""
        self._writer.close()
