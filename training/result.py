"""Selects the model of a run and writes its checkpoint."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from robust import files
from robust.checkpoint import save_checkpoint
from robust.classifier import Classifier
from robust.environment import device_in_words, versions
from robust.sidecar import DataRecord, Sidecar
from training.data import TrainingData
from training.scoring import final_score
from training.state import Best, RunFolder, RunState, StateWriter
from training.step import Trainer

logger = logging.getLogger(__name__)


def keep_if_best(state: RunState, row: dict[str, Any], model: nn.Module, *, select: str) -> None:
    """Keep the weights of `model` if its score `row` is at least that of the best so far."""
    value = row["pgd"]
    if select == "mean":
        value = (row["pgd"] + row["clean"]) / 2
    elif select == "clean":
        value = row["clean"]
    elif select == "last":
        value = float(row["epoch"])
    if state.best is None or value >= state.best.score:
        weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        state.best = Best(score=value, epoch=row["epoch"], weights=weights)


def write_result(
    trainer: Trainer,
    data: TrainingData,
    state: RunState,
    folder: RunFolder,
    manifest: dict[str, Any],
    *,
    classes: tuple[str, ...],
    writer: StateWriter,
) -> Sidecar:
    """Score the kept model on all held-out images, and write its checkpoint with its sidecar.

    Meanwhile `writer` writes the run's last state, which the checkpoint then replaces.
    """
    classifier, best, world = trainer.averaged.module, state.best, trainer.collectives.world
    assert best is not None
    assert isinstance(classifier, Classifier)
    classifier.load_state_dict(best.weights)
    classifier.half().float()  # rounded as it will be stored, so that the stored model is scored
    result = final_score(
        trainer, data.held_images, data.held_labels, threat_model=trainer.threat_model
    )
    for flag in result.flags:
        logger.warning("%s: %s; %s", flag.name, flag.text, flag.advice)
    sidecar = Sidecar(
        architecture=classifier.architecture,
        classes=classes,
        threat_model=trainer.threat_model,
        recipe={
            **manifest["recipe"],
            **({"minutes": manifest["minutes"]} if "minutes" in manifest else {}),
            "kept_epoch": best.epoch,
            "init": manifest["init"],
            "validation": manifest["validation"],
        },
        data=DataRecord(**manifest["data"]),
        seed=manifest["seed"],
        versions=versions(),
        device=world.in_words(device_in_words(trainer.device)),
        duration_seconds=round(state.seconds, 1),
        evaluation=[{**data.held_source, **r.summary()} for r in result.accuracies],
    )

    def write() -> Sidecar:
        writer.wait()
        written = save_checkpoint(folder.out, classifier, sidecar)
        files.write_json(folder.manifest, {**manifest, "versions": versions(), "finished": True})
        folder.state.unlink(missing_ok=True)
        return written

    return world.on_rank0(write)
