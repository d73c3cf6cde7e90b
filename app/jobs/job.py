"""The evaluation job: what was requested, its state and its result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from robust.attacks import AttackSettings, resolve_attack
from robust.datasets import Dataset
from robust.evaluation.curve import CURVE, CURVE_ATTACK
from robust.evaluation.precision import Precision
from robust.threat_model import ThreatModel

JobState = Literal["queued", "running", "done", "failed", "cancelled"]
ACTIVE: tuple[JobState, ...] = ("queued", "running")
STATES: tuple[JobState, ...] = (*ACTIVE, "done", "failed", "cancelled")
ROW_BYTES = 256  # most bytes of the journal per image and stage; a test measures it
JOURNAL_BYTES = 64 * 1024  # of an empty journal
CURVE_POINTS = len(CURVE) + 1  # most eps of an image's curve: the largest one too


@dataclass(eq=False, kw_only=True)
class Job:
    """An evaluation: what was requested, its state and its result."""

    id: str
    model: str  # SHA-256
    dataset: str
    images: int
    attacks: tuple[AttackSettings, ...]
    created: datetime
    curve: int = 0  # images of the accuracy-against-eps curve
    precision: Precision = "auto"  # auto for jobs from before it was recorded
    digest: str = ""  # of everything that determines the result
    key: str | None = None  # the Idempotency-Key; see `scoped_key`
    owner: str | None = None  # who may see it: a hash of an API key; None without keys
    bytes: int = 0  # the most that its images, journal and result need
    state: JobState = "queued"
    result: dict[str, Any] | None = None  # the evaluation so far, as JSON values
    error: str | None = None
    finished: datetime | None = None
    version: int = 0  # incremented by every change
    run: int | None = None  # number of the run, if another replica can take over

    @property
    def active(self) -> bool:
        """Whether it is queued or running."""
        return self.state in ACTIVE

    @property
    def cost(self) -> int:
        """The most forward passes it can take, counting a backward pass as one."""
        passes = self.images * (1 + sum(attack.cost for attack in self.attacks))
        if self.curve and self.attacks:
            point = resolve_attack(CURVE_ATTACK, self.attacks[0].threat_model)
            passes += min(self.curve, self.images) * CURVE_POINTS * point.cost
        return passes

    def about(self) -> dict[str, Any]:
        """What was requested, as JSON values."""
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
            "owner": self.owner,
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
    """The most bytes that a running job stores: its images, labels and journal."""
    stages = 1 + sum(len(attack.stages) for attack in attacks)
    rows = len(dataset) * stages + min(curve, len(dataset)) * CURVE_POINTS
    return dataset.images.nbytes + dataset.labels.nbytes + JOURNAL_BYTES + ROW_BYTES * rows


def digest_of(
    model: str,
    dataset: Dataset,
    attacks: Sequence[AttackSettings],
    curve: int,
    precision: Precision,
    owner: str | None = None,
) -> str:
    """SHA-256 of everything that determines the result of an evaluation, and of its owner."""
    settings = [_attack_to_dict(attack) for attack in attacks]
    values = [model, dataset.sha256, settings, curve, precision]
    if owner is not None:
        values.append(owner)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def scoped_key(key: str | None, owner: str | None) -> str | None:
    """The client's idempotency key, made distinct from the same key of other owners."""
    if key is None or owner is None:
        return key
    return hashlib.sha256(f"{owner} {key}".encode()).hexdigest()


def _attack_to_dict(attack: AttackSettings) -> dict[str, Any]:
    stages = [_attack_to_dict(stage) for stage in attack.own_stages]
    return {**vars(attack), "threat_model": vars(attack.threat_model), "own_stages": stages}


def _attack_from_dict(values: dict[str, Any]) -> AttackSettings:
    stages = tuple(map(_attack_from_dict, values["own_stages"]))
    ball = ThreatModel(**values["threat_model"])
    return AttackSettings(**{**values, "threat_model": ball, "own_stages": stages})
