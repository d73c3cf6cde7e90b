"""Converts the library's results to the service's responses."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from torch import Tensor

from app.engine.attack_batch import Transfer
from app.http.schemas import (
    AttackResult,
    ClassName,
    ClassProbability,
    EvaluationResult,
    JobStatus,
    Outcome,
    ResolvedAttack,
    Seen,
    TransferResult,
)
from app.jobs.job import Job
from robust.attacks import AttackSettings
from robust.images import encode_png
from robust.prediction import AttackOutcome, top_classes

TOP = 5


def to_prediction(
    probabilities: Tensor | Sequence[float], classes: Sequence[str], k: int = TOP
) -> Seen:
    """The `k` likeliest classes of probabilities (K,)."""
    top = [
        ClassProbability(label=item.label, index=item.index, probability=item.probability)
        for item in top_classes(probabilities, classes, k)
    ]
    return Seen(**dict(top[0]), top=top)


def class_name(index: int, classes: Sequence[str]) -> ClassName:
    """A class by index and name."""
    return ClassName(label=classes[index], index=index)


def resolved(attack: AttackSettings) -> ResolvedAttack:
    """The parameters of an attack."""
    return ResolvedAttack(attack=attack.label, name=attack.name, **attack.to_dict())


def outcome_of(outcome: AttackOutcome) -> Outcome:
    """The outcome: broken or withstood, or already_wrong if the attack had nothing to do."""
    if _succeeded(outcome.before, outcome.label, outcome.target):
        return "already_wrong"
    return "broken" if outcome.success and outcome.linf > 0 else "withstood"


def already_wrong(found: AttackOutcome | Transfer) -> bool:
    """Whether the model misclassified the original image, or classified it as the target."""
    return found.already_wrong or int(found.before.argmax()) == found.target


def transfer_result(transfer: Transfer, classes: Sequence[str]) -> TransferResult:
    """The other model's prediction and outcome for an adversarial image."""
    label, target = transfer.label, transfer.target
    outcome: Outcome = "broken" if _succeeded(transfer.after, label, target) else "withstood"
    if _succeeded(transfer.before, label, target):
        outcome = "already_wrong"
    return TransferResult(after=to_prediction(transfer.after, classes), outcome=outcome)


def _succeeded(probabilities: Tensor, label: int, target: int | None) -> bool:
    """Whether the prediction is the target or, without one, not the label."""
    predicted = int(probabilities.argmax())
    return predicted != label if target is None else predicted == target


def attack_result(
    outcome: AttackOutcome, classes: Sequence[str], transfer: Transfer | None = None
) -> AttackResult:
    """The result of one attack, with its images as PNG, and the other model's result if any."""
    return AttackResult(
        parameters=resolved(outcome.settings),
        after=to_prediction(outcome.after, classes),
        outcome=outcome_of(outcome),
        success=outcome_of(outcome) == "broken",
        linf=outcome.linf,
        l2=outcome.l2,
        seconds=outcome.seconds,
        adversarial_png=base64_png(outcome.image),
        perturbation_png=base64_png(outcome.perturbation),
        transfer=None if transfer is None else transfer_result(transfer, classes),
    )


def base64_png(image: Tensor) -> str:
    """A uint8 image (3, H, W) as PNG in base64."""
    return base64.b64encode(encode_png(image)).decode("ascii")


def job_status(job: Job) -> JobStatus:
    """The job's state and its result so far."""
    return JobStatus(
        id=job.id,
        state=job.state,
        model_sha256=job.model,
        dataset=job.dataset,
        images=job.images,
        attacks=[resolved(attack) for attack in job.attacks],
        created=job.created,
        finished=job.finished,
        evaluation=None if job.result is None else EvaluationResult.model_validate(job.result),
        error=job.error,
    )
