"""What an evaluation found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from robust.attacks import AttackSettings
from robust.evaluation.intervals import wilson_interval
from robust.threat_model import format_eps

MAX_CONFUSION = 100  # classes; the table of more is no longer read by anyone
_BULKY = ("confusion", "stages")


@dataclass(frozen=True, kw_only=True)
class Distances:
    """How far the adversarial images lie from theirs, in pixel units of the attack's norm."""

    least: float
    median: float
    most: float


@dataclass(frozen=True, kw_only=True)
class StageAccuracy:
    """One attack of several run in turn: how many images it was tried on and how many it left."""

    attack: str
    attacked: int
    correct: int  # of all n images, after it
    seconds: float = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How many of n images were classified right, clean (`attack` None) or under attack."""

    attack: AttackSettings | None
    correct: int
    n: int
    per_class: tuple[tuple[int, int], ...]  # right and all, for each class
    confusion: tuple[tuple[int, ...], ...] = ()  # of images of a row's class, seen as a column's
    distances: Distances | None = None  # of what fooled the model; None where nothing did
    stages: tuple[StageAccuracy, ...] = ()  # where the attack is made of several
    forwards: int = 0  # passes spent, an image each
    backwards: int = 0
    unheld: int = 0  # successes that the last exact pass did not confirm; counted as right
    seconds: float = field(default=0.0, compare=False)  # spent on it

    @property
    def label(self) -> str:
        """``clean`` or the attack with its budget."""
        return self.attack.label if self.attack else "clean"

    @property
    def value(self) -> float:
        """The accuracy, in [0, 1]; NaN before the first image."""
        return self.correct / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson 95% interval of `value`."""
        return wilson_interval(self.correct, self.n)

    def summary(self) -> dict[str, Any]:
        """`to_dict` without what fills a page: confusion, and the parts it is made of."""
        values = self.to_dict()
        return {name: value for name, value in values.items() if name not in _BULKY}

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with the Wilson 95% interval."""
        values: dict[str, Any] = {
            "attack": self.label,
            "accuracy": self.value if self.n else None,
            "correct": self.correct,
            "n": self.n,
            "interval": list(self.interval),
            "per_class": [right / n if n else None for right, n in self.per_class],
            "confusion": [list(row) for row in self.confusion],
            "distances": vars(self.distances) if self.distances else None,
            "stages": [vars(stage) for stage in self.stages],
            "forwards": self.forwards,
            "backwards": self.backwards,
            "unheld": self.unheld,
            "seconds": self.seconds,
        }
        if self.attack:
            values |= {
                "norm": self.attack.threat_model.norm,
                "eps": self.attack.threat_model.eps,
                "eps_text": format_eps(self.attack.threat_model.eps),
                "alpha": self.attack.alpha,
                "steps": self.attack.steps,
                "restarts": self.attack.restarts,
                "seed": self.attack.seed,
            }
        return values


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Accuracy over `n` of the images under one attack with a radius of `eps`."""

    eps: float
    correct: int
    n: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with the Wilson 95% interval."""
        return {
            "eps": self.eps,
            "eps_text": format_eps(self.eps),
            "accuracy": self.correct / self.n if self.n else None,
            "correct": self.correct,
            "n": self.n,
            "interval": list(wilson_interval(self.correct, self.n)),
        }


@dataclass(frozen=True, kw_only=True)
class Probes:
    """What was seen of the model itself, on `n` of the images, before it was attacked."""

    n: int
    difference: float  # largest between two passes over the same images, share of a logit's size
    probabilities: bool  # rows that are shares of one: a softmax is inside
    zero_gradients: int  # images whose cross-entropy has no slope at all
    nan_gradients: int
    right: int  # images classified right as they came
    right_normalised: int  # and at best with one of the usual normalisations before the model
    normalisation: str = ""  # which one that was
    search_difference: float = 0.0  # largest to the faster copy that is searched, as `difference`


@dataclass(frozen=True, kw_only=True)
class Flag:
    """A reason not to trust an evaluation: what was seen, and what to do about it."""

    name: str
    text: str
    advice: str

    def __str__(self) -> str:
        return f"{self.text}; {self.advice}"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results over `n` of `total` images: clean, each attack, and the worst of them.

    While it runs, each accuracy says over how many images it is; `n` is the fewest of them.
    """

    n: int
    total: int
    clean: Accuracy
    attacks: tuple[Accuracy, ...]
    worst_correct: int  # images right when clean and under every attack
    curve: tuple[CurvePoint, ...] = ()
    probes: Probes | None = None
    flags: tuple[Flag, ...] = ()  # of a finished evaluation
    notes: tuple[str, ...] = ()  # what an attack had to do otherwise than usual
    precision: str = "fp32"
    done: float = 1.0  # share of the work, [0, 1]
    stage: str = ""  # what is running; empty when all is done

    @property
    def accuracies(self) -> tuple[Accuracy, ...]:
        """Clean first, then the attacks in order."""
        return (self.clean, *self.attacks)

    def accuracy(self, label: str) -> float:
        """The accuracy under the attack of that label, or ``clean``. KeyError for another."""
        return {item.label: item.value for item in self.accuracies}[label]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "n": self.n,
            "total": self.total,
            "results": [item.to_dict() for item in self.accuracies],
            "worst_case": {
                "accuracy": self.worst_correct / self.n if self.n else None,
                "correct": self.worst_correct,
                "n": self.n,
                "interval": list(wilson_interval(self.worst_correct, self.n)),
            },
            "curve": [point.to_dict() for point in self.curve],
            "probes": vars(self.probes) if self.probes else None,
            "flags": [vars(flag) for flag in self.flags],
            "notes": list(self.notes),
            "precision": self.precision,
        }
