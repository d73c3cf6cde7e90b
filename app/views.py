"""From the library's results to the service's answers."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from torch import Tensor

from app.job import Job
from app.schemas import (
    AttackResult,
    ClassName,
    ClassProbability,
    EvaluationResult,
    JobStatus,
    ResolvedAttack,
    Seen,
)
from robust.attacks import AttackSettings
from robust.images import encode_png
from robust.prediction import AttackOutcome, top_classes
from robust.threat_model import format_eps

TOP = 5


def seen(probabilities: Tensor | Sequence[float], classes: Sequence[str], k: int = TOP) -> Seen:
    """What probabilities (K,) say."""
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
    return ResolvedAttack(
        attack=attack.label,
        name=attack.name,
        norm=attack.threat_model.norm,
        eps=attack.threat_model.eps,
        eps_text=format_eps(attack.threat_model.eps),
        alpha=attack.alpha,
        steps=attack.steps,
        restarts=attack.restarts,
        random_start=attack.random_start,
        seed=attack.seed,
    )


def attack_result(outcome: AttackOutcome, classes: Sequence[str]) -> AttackResult:
    """One attack, with its images encoded."""
    return AttackResult(
        parameters=resolved(outcome.settings),
        after=seen(outcome.after, classes),
        success=outcome.success,
        linf=outcome.linf,
        l2=outcome.l2,
        seconds=outcome.seconds,
        adversarial_png=base64_png(outcome.image),
        perturbation_png=base64_png(outcome.perturbation),
    )


def base64_png(image: Tensor) -> str:
    """A uint8 image (3, H, W) as the text of a PNG."""
    return base64.b64encode(encode_png(image)).decode("ascii")


def job_status(job: Job) -> JobStatus:
    """Where a job is."""
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
