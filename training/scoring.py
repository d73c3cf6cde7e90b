"""Scores of a model in training, in a precision that does not depend on timing.

`evaluate` may time the CPU's passes to choose a precision. Then a resumed run could score the same
weights differently, and keep others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from robust.attacks import resolve_attack
from robust.classifier import Classifier
from robust.evaluation import Evaluation, evaluate_batches
from robust.inference import for_inference, in_bfloat16
from robust.threat_model import ThreatModel
from training.step import Trainer


def score(trainer: Trainer, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Clean, FGSM and PGD-10 accuracy, in [0, 1], of the averaged model on uint8 images."""
    batch_size = 250 if trainer.device.type == "cpu" else 1000
    result = _evaluate(
        trainer,
        images,
        labels,
        attacks=("fgsm", "pgd-10"),
        threat_model=trainer.threat_model,
        batch_size=batch_size,
    )
    return {
        "clean": result.accuracy("clean"),
        "fgsm": result.accuracy("fgsm"),
        "pgd": result.accuracy("pgd-10"),
    }


def final_score(
    trainer: Trainer, images: Tensor, labels: Tensor, *, threat_model: ThreatModel
) -> Evaluation:
    """Clean, FGSM and PGD-20 accuracy of the averaged model on uint8 images (N, 3, H, W)."""
    return _evaluate(
        trainer,
        images,
        labels,
        attacks=("fgsm", "pgd-20"),
        threat_model=threat_model,
        batch_size=250,
    )


def _evaluate(
    trainer: Trainer,
    images: Tensor,
    labels: Tensor,
    *,
    attacks: Sequence[str],
    threat_model: ThreatModel,
    batch_size: int,
) -> Evaluation:
    *_, last = evaluate_batches(
        trainer.averaged.module,
        images,
        labels,
        num_classes=trainer.num_classes,
        attacks=[resolve_attack(name, threat_model) for name in attacks],
        device=trainer.device,
        batch_size=batch_size,
        world=trainer.collectives.world,
        **_precision(trainer),
    )
    return last


def _precision(trainer: Trainer) -> dict[str, Any]:
    """Settings for `evaluate_batches`: on the CPU the precision of training, elsewhere `auto`."""
    if trainer.device.type != "cpu":
        return {}  # `auto` compares gradients there and times nothing
    model = trainer.averaged.module
    assert isinstance(model, Classifier)
    fast = for_inference(model)
    # With copies of our own, as `evaluate_batches` would time whether to prepack their weights.
    if not trainer.bf16:
        return {"precision": "fp32", "fast": fast.forward}
    return {"precision": "bf16", "fast": fast, "bf16": in_bfloat16(fast)}
