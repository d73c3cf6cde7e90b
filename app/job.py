"""An evaluation job: what was asked for, and what is known of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from app.schemas import JobState
from robust.attacks import AttackSettings
from robust.datasets import Dataset
from robust.evaluation.precision import Precision
from robust.evaluation.work import CURVE
from robust.threat_model import ThreatModel

ACTIVE: tuple[JobState, ...] = ("queued", "running")
STATES: tuple[JobState, ...] = (*ACTIVE, "done", "failed", "cancelled")
ROW_BYTES = 256  # that a journal takes for an image and a stage; a test measures it
JOURNAL_BYTES = 64 * 1024  # that a journal takes without any


@dataclass(eq=False, kw_only=True)
class Job:
    """An evaluation and what is known of it."""

    id: str
    model: str  # SHA-256
    dataset: str
    images: int
    attacks: tuple[AttackSettings, ...]
    created: datetime
    curve: int = 0  # images of the accuracy-against-eps curve
    precision: Precision = "auto"  # auto for jobs of before it was kept
    digest: str = ""  # of all that decides the result
    key: str | None = None  # the client's own name for it
    bytes: int = 0  # that its images, journal and result may take
    state: JobState = "queued"
    result: dict[str, Any] | None = None  # the evaluation so far, as JSON values
    error: str | None = None
    finished: datetime | None = None
    version: int = 0  # grows with every change
    run: int | None = None  # which of several, where another replica can take over

    @property
    def active(self) -> bool:
        """Whether there is more to come."""
        return self.state in ACTIVE

    @property
    def cost(self) -> int:
        """Forward passes, a backward pass as one."""
        return self.images * (1 + sum(attack.cost for attack in self.attacks))

    def about(self) -> dict[str, Any]:
        """What was asked for, as JSON values."""
        return {
            "model": self.model,
            "dataset": self.dataset,
            "images": self.images,
            "attacks": [_attack_to_dict(attack) for attack in self.attacks],
            "created": self.created.isoformat(),
            "curve": self.curve,
            "precision": self.precision,
            "digest": self.digest,
            "key": self.key,
            "bytes": self.bytes,
        }

    @classmethod
    def from_about(cls, id: str, about: dict[str, Any]) -> Job:
        """The job that `about` describes. Raises KeyError, TypeError or ValueError."""
        values = dict(about)
        values["attacks"] = tuple(map(_attack_from_dict, values["attacks"]))
        values["created"] = datetime.fromisoformat(values["created"])
        return cls(id=id, **values)


def bytes_for(dataset: Dataset, attacks: Sequence[AttackSettings], curve: int) -> int:
    """What a job may come to take while it is at work: its images, labels and journal."""
    stages = 1 + sum(len(attack.stages) for attack in attacks)
    points = len(CURVE) + 2  # and eps itself, and as much as there is room for
    rows = len(dataset) * stages + min(curve, len(dataset)) * points
    return dataset.images.nbytes + dataset.labels.nbytes + JOURNAL_BYTES + ROW_BYTES * rows


def digest_of(
    model: str,
    dataset: Dataset,
    attacks: Sequence[AttackSettings],
    curve: int,
    precision: Precision,
) -> str:
    """SHA-256 of all that decides the result of an evaluation."""
    settings = [_attack_to_dict(attack) for attack in attacks]
    decisive = [model, dataset.sha256, settings, curve, precision]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _attack_to_dict(attack: AttackSettings) -> dict[str, Any]:
    return {**vars(attack), "threat_model": vars(attack.threat_model)}


def _attack_from_dict(values: dict[str, Any]) -> AttackSettings:
    return AttackSettings(**{**values, "threat_model": ThreatModel(**values["threat_model"])})
