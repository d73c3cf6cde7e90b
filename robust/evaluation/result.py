"""The result of an evaluation, and its JSON form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import permutations
from pathlib import Path
from typing import Any, Self

from robust.attacks import AttackSettings, resolve_attack
from robust.evaluation.intervals import wilson_interval
from robust.evaluation.tables import accuracy_table, curve_table
from robust.files import to_json, write_json
from robust.threat_model import ThreatModel, format_eps

SHOWN = 10  # maximum indices of images in a line of text
MAX_CONFUSION = 100  # classes; nobody reads a larger table
_BULKY = ("per_class_counts", "confusion", "stages", "fooled")


@dataclass(frozen=True, kw_only=True)
class Distances:
    """Distances of the adversarial images from the originals, in pixel units."""

    least: float
    median: float
    most: float


@dataclass(frozen=True, kw_only=True)
class StageAccuracy:
    """One stage of an attack: how many images it attacked and how many stayed robust."""

    attack: str
    attacked: int
    correct: int  # of all n images, after this stage
    seconds: float = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How many of n images are classified correctly, clean (`attack` None) or under attack."""

    attack: AttackSettings | None
    correct: int
    n: int
    per_class: tuple[tuple[int, int], ...]  # correct and total, for each class
    confusion: tuple[tuple[int, ...], ...] = ()  # rows: true class, columns: predicted class
    distances: Distances | None = None  # of the images that fooled the model; None if none did
    stages: tuple[StageAccuracy, ...] = ()  # of a multi-stage attack
    forwards: int = 0  # passes spent, counted per image
    backwards: int = 0
    unconfirmed: int = 0  # successes that the exact model did not confirm; counted as robust
    seconds: float = field(default=0.0, compare=False)  # spent on it
    # Indices in the call of the images that a finished multi-stage attack fooled.
    fooled: tuple[int, ...] = ()

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
        """`to_dict` without the long parts, such as confusion and stages."""
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
            "per_class_counts": [list(counts) for counts in self.per_class],
            "confusion": [list(row) for row in self.confusion],
            "distances": vars(self.distances) if self.distances else None,
            "stages": [vars(stage) for stage in self.stages],
            "forwards": self.forwards,
            "backwards": self.backwards,
            "unconfirmed": self.unconfirmed,
            "seconds": self.seconds,
            "fooled": list(self.fooled),
        }
        if self.attack:
            values |= self.attack.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The accuracy that `to_dict` wrote. Raises ValueError and KeyError for anything else."""
        confusion = tuple(tuple(row) for row in values["confusion"])
        counts = values.get("per_class_counts")
        if counts is None:  # in older results
            counts = [(row[label], sum(row)) for label, row in enumerate(confusion)]
        per_class = tuple((right, n) for right, n in counts)
        return cls(
            attack=_attack_from(values) if "norm" in values else None,
            correct=values["correct"],
            n=values["n"],
            per_class=per_class or ((0, 0),) * len(values["per_class"]),
            confusion=confusion,
            distances=Distances(**values["distances"]) if values["distances"] else None,
            stages=tuple(StageAccuracy(**stage) for stage in values["stages"]),
            forwards=values["forwards"],
            backwards=values["backwards"],
            unconfirmed=values.get("unconfirmed", values.get("unheld", 0)),  # its older name
            seconds=values["seconds"],
            fooled=tuple(values.get("fooled", ())),  # none in older results
        )


def _attack_from(values: Mapping[str, Any]) -> AttackSettings:
    ball = ThreatModel(norm=values["norm"], eps=values["eps"])
    name = str(values["attack"]).removesuffix(f"x{values['restarts']}")
    return resolve_attack(
        name,
        ball,
        alpha=values["alpha"],
        steps=values["steps"],
        restarts=values["restarts"],
        random_start=values.get("random_start", True),  # none in older results
        stages=[stage["attack"] for stage in values["stages"]] or None,
        seed=values["seed"],
    )


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Images that one multi-stage attack fooled and another in the same ball did not."""

    attack: str
    other: str
    images: tuple[int, ...]  # their indices in the call, from 0

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.images[:SHOWN])) + ", ..." * (len(self.images) > SHOWN)
        count = f"{len(self.images)} image{'s' * (len(self.images) != 1)}" if shown else "none"
        where = f" (index {shown})" if shown else ""
        return f"fooled by {self.attack} but not by {self.other}: {count}{where}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "attack": self.attack,
            "other": self.other,
            "count": len(self.images),
            "indices": list(self.images),
        }


def differences(attacks: Sequence[Accuracy]) -> tuple[Difference, ...]:
    """Both differences of each pair of finished multi-stage attacks in the same ball."""
    finished = [item for item in attacks if item.attack and item.stages]
    return tuple(
        Difference(
            attack=one.label,
            other=other.label,
            images=tuple(sorted(set(one.fooled) - set(other.fooled))),
        )
        for one, other in permutations(finished, 2)
        if one.attack and other.attack and one.attack.threat_model == other.attack.threat_model
    )


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Accuracy of `n` images under one attack with radius `eps`."""

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
    """Checks of the model on the first `n` images, before any attack."""

    n: int
    difference: float  # largest between two passes over the same images, relative to the logits
    probabilities: bool  # every row sums to 1: the model ends in a softmax
    zero_gradients: int  # images whose cross-entropy has a gradient of 0
    nan_gradients: int
    right: int  # images classified correctly
    # The same with the best of the usual normalizations before the model; None if there are too
    # few images, if none was better on the first few, or if none can be significantly better.
    right_normalized: int | None
    # Images whose gradient was checked; None: all, 0: the model gives none.
    differentiated: int | None = None
    normalization: str = ""  # the name of that normalization
    search_difference: float = 0.0  # `difference` of the faster float32 copy from the model
    sigmoid: bool = False  # all outputs are in [0, 1], some near 0 and some near 1


@dataclass(frozen=True, kw_only=True)
class Flag:
    """A warning about an evaluation: what was observed, and what to do about it."""

    name: str
    text: str
    advice: str

    def __str__(self) -> str:
        return f"{self.text}; {self.advice}"


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of an evaluation since it started or resumed.

    Passes on an accelerator are not measured; then `passes` and `limit` are None.
    """

    evaluation: float
    passes: float | None  # inside the model
    limit: float | None  # of the same passes at the rate of the fastest batch seen

    def __str__(self) -> str:
        if self.passes is None or self.limit is None:
            return ""
        return f"{self.passes:.1f} s inside the model; {self.limit:.1f} s at the fastest rate seen"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results on `n` of `total` images: clean, under each attack, and in the worst case.

    While it runs, each accuracy has its own number of images; `n` is the smallest.
    """

    n: int
    total: int
    clean: Accuracy
    attacks: tuple[Accuracy, ...]
    worst_correct: int  # images that are correct clean and under every attack
    curve: tuple[CurvePoint, ...] = ()
    probes: Probes | None = None
    flags: tuple[Flag, ...] = ()  # of a finished evaluation
    notes: tuple[str, ...] = ()  # changes to attacks and curve, and missing classes
    image_dtype: str = "uint8"  # images were scored as given, in this dtype
    precision: str = "fp32"
    precision_reason: str = field(default="", compare=False)  # why the search used it
    times: Times | None = field(default=None, compare=False)
    done: float = 1.0  # share of the work, [0, 1]
    stage: str = ""  # the running stage; empty when all are done

    @property
    def accuracies(self) -> tuple[Accuracy, ...]:
        """Clean first, then the attacks in order."""
        return (self.clean, *self.attacks)

    def accuracy(self, label: str) -> float:
        """The accuracy under the attack of that label, or ``clean``.

        Raises KeyError for another label, and ValueError if several attacks have it.
        """
        found = [item for item in self.accuracies if item.label == label]
        if not found:
            raise KeyError(label)
        if len(found) > 1:
            balls = [item.attack.threat_model for item in found if item.attack]
            sizes = ", ".join(f"{ball.norm} {format_eps(ball.eps)}" for ball in balls)
            raise ValueError(
                f"expected a label of one attack, got {label} of {len(found)} ({sizes}); "
                "take one of `attacks`"
            )
        return found[0].value

    @property
    def differences(self) -> tuple[Difference, ...]:
        """Images that only one of two finished multi-stage attacks fooled."""
        return differences(self.attacks) if not self.stage else ()

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
            "differences": [item.to_dict() for item in self.differences],
            "curve": [point.to_dict() for point in self.curve],
            "probes": vars(self.probes) if self.probes else None,
            "flags": [vars(flag) for flag in self.flags],
            "notes": list(self.notes),
            "image_dtype": self.image_dtype,
            "precision": self.precision,
            "precision_reason": self.precision_reason,
            "times": vars(self.times) if self.times else None,
        }

    def __str__(self) -> str:
        """The tables of the command line, with precision, notes and warnings under them."""
        lines = [accuracy_table(self), *map(str, self.differences)]
        if self.curve:
            lines += [f"at other eps ({self.curve[0].n} images):", curve_table(self)]
        lines.append(f"{self.precision}{self.precision_reason and f' ({self.precision_reason})'}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, *(f"warning: {flag.name}: {flag}" for flag in self.flags)])

    def to_json(self, path: Path | str | None = None) -> str:
        """`to_dict` as JSON text, also written to `path` where one is given."""
        if path is not None:
            write_json(Path(path), self.to_dict())
        return to_json(self.to_dict()).decode()

    def to_markdown(self) -> str:
        """The table of the command line in Markdown."""
        return accuracy_table(self, "markdown")

    def to_pandas(self) -> Any:
        """A DataFrame with a row for clean and each attack; raises ImportError without pandas."""
        try:
            pandas = import_module("pandas")
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas") from error
        return pandas.DataFrame([item.summary() for item in self.accuracies])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The evaluation that `to_dict` wrote, except `done` and `stage`.

        Raises ValueError and KeyError for anything else.
        """
        clean, *attacks = map(Accuracy.from_dict, values["results"])
        probes, curve = values["probes"], values["curve"]
        return cls(
            n=values["n"],
            total=values["total"],
            clean=clean,
            attacks=tuple(attacks),
            worst_correct=values["worst_case"]["correct"],
            curve=tuple(CurvePoint(eps=p["eps"], correct=p["correct"], n=p["n"]) for p in curve),
            probes=Probes(**probes) if probes else None,
            flags=tuple(Flag(**flag) for flag in values["flags"]),
            notes=tuple(values["notes"]),
            image_dtype=values["image_dtype"],
            precision=values["precision"],
            precision_reason=values["precision_reason"],
            times=Times(**values["times"]) if values.get("times") else None,
        )
