"""Evaluations for the report: the JSON of `robust evaluate`, or results in a sidecar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust import files
from robust.evaluation import wilson_interval
from robust.report.run import ReportError
from robust.report.words import images_of
from robust.sidecar import Sidecar

CLEAN, WORST = "clean", "worst case"
_EXPECTED = "the JSON of robust evaluate --json"


@dataclass(frozen=True, kw_only=True)
class Result:
    """Accuracy under one attack, or ``clean``. Sizes are in pixel units, shares in [0, 1]."""

    attack: str
    correct: int
    n: int
    interval: tuple[float, float]
    per_class: tuple[float | None, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()  # rows: class, columns: prediction
    norm: str = ""
    eps: float | None = None
    eps_text: str = ""
    stages: tuple[dict[str, Any], ...] = ()
    fooled: tuple[int, ...] | None = None  # indices of images; only of multi-stage attacks
    settings: dict[str, Any]
    forwards: int | None = None
    backwards: int | None = None
    seconds: float | None = None

    @property
    def accuracy(self) -> float:
        """The share of images that are classified correctly."""
        return self.correct / self.n

    @property
    def passes(self) -> int | None:
        """Forward and backward passes, counted per image; None if not recorded."""
        if self.forwards is None or self.backwards is None:
            return None
        return self.forwards + self.backwards

    @property
    def ball(self) -> str:
        """Norm and eps as text; empty for clean."""
        return f"{self.norm} {self.eps_text}".strip()


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Accuracy at one eps."""

    eps: float
    eps_text: str
    correct: int
    n: int
    interval: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One evaluation. If `recorded`, it is from a sidecar, which stores less."""

    source: str  # the file's name
    data: str
    results: tuple[Result, ...]
    worst: Result | None = None  # over all attacks together, if there are several
    curve: tuple[CurvePoint, ...] = ()
    probes: dict[str, Any] | None = None
    times: dict[str, float] | None = None  # of the evaluation and of its passes, in seconds
    flags: tuple[dict[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    manifest: dict[str, Any]
    recorded: bool = False

    @property
    def n(self) -> int:
        """The number of images."""
        return self.results[0].n

    @property
    def scored(self) -> str:
        """SHA-256 of the scored images in order; empty if unknown."""
        return str(self.manifest.get("data", {}).get("scored_sha256", ""))

    @property
    def title(self) -> str:
        """A short title."""
        return f"{images_of(self.n, self.data)} ({self.source})"

    @property
    def without_gradients(self) -> bool:
        """Whether the model gave no gradients, so that only random searches could attack it."""
        return (self.probes or {}).get("differentiated") == 0

    @property
    def clean(self) -> Result | None:
        """The clean result."""
        return next((item for item in self.results if item.attack == CLEAN), None)

    @property
    def attacks(self) -> tuple[Result, ...]:
        """The results under attack."""
        return tuple(item for item in self.results if item.attack != CLEAN)

    @property
    def hardest(self) -> Result | None:
        """The attack with the lowest accuracy."""
        return min(self.attacks, key=lambda item: item.correct, default=None)

    @property
    def robust(self) -> Result | None:
        """The robust accuracy: the worst case over all attacks, if there are several."""
        return self.worst or self.hardest


def read_evaluation(path: Path, *, sidecar: Sidecar, sha256: str) -> Measurement:
    """Read the JSON of `robust evaluate` for the weights `sha256`. Raises ReportError."""
    try:
        values = files.read_json(path)
    except FileNotFoundError:
        raise ReportError(path, _EXPECTED, "no such file") from None
    except IsADirectoryError:
        raise ReportError(path, _EXPECTED, "a folder") from None
    except ValueError as error:
        raise ReportError(path, _EXPECTED, f"incomplete or malformed text: {error}") from None
    return parse_evaluation(values, source=path.name, sidecar=sidecar, sha256=sha256)


def parse_evaluation(values: Any, *, source: str, sidecar: Sidecar, sha256: str) -> Measurement:
    """The measurement with these JSON values. Raises ReportError, also for another checkpoint."""
    if not isinstance(values, dict) or not {"weights_sha256", "results", "data"} <= set(values):
        raise ReportError(source, _EXPECTED, "something else")
    found = values["weights_sha256"]
    if found != sha256:
        raise ReportError(
            source,
            f"an evaluation of the weights with SHA-256 {sha256[:16]}…",
            f"one of {str(found)[:16]}…",
        )
    classes = values.get("classes", list(sidecar.classes))
    if classes != list(sidecar.classes):
        raise ReportError(source, "the classes of the checkpoint", "others")
    try:
        return _measurement(values, source)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ReportError(source, _EXPECTED, f"a part missing or malformed ({error!r})") from None


def _measurement(values: dict[str, Any], source: str) -> Measurement:
    results = tuple(_result(row) for row in values["results"])
    if not results or results[0].attack != CLEAN:
        raise ValueError("no clean accuracy")
    attacks = results[1:]
    worst = values.get("worst_case") if len(attacks) > 1 else None
    if worst:
        same = len({result.ball for result in attacks}) == 1
        ball = {name: getattr(attacks[0], name) for name in ("norm", "eps", "eps_text")}
        worst = {"attack": WORST, **worst, **(ball if same else {})}
    kept = ("data", "seed", "batch_size", "precision", "device", "versions", "seconds")
    return Measurement(
        source=source,
        data=str(values["data"]["name"]),
        results=results,
        worst=_result(worst) if worst else None,
        curve=tuple(_point(row) for row in values.get("curve") or ()),
        probes=None if values.get("probes") is None else dict(values["probes"]),
        times=_times(values.get("times")),
        flags=tuple(
            {name: str(flag[name]) for name in ("name", "text", "advice")}
            for flag in values.get("flags") or ()
        ),
        notes=tuple(map(str, values.get("notes") or ())),
        manifest={name: values[name] for name in kept if name in values}
        | {"data": dict(values["data"]), "versions": dict(values.get("versions") or {})},
    )


def _times(values: Any) -> dict[str, float] | None:
    names = ("evaluation", "passes", "limit")
    if values is None or any(values[name] is None for name in names):
        return None
    return {name: float(values[name]) for name in names}


def recorded_evaluations(sidecar: Sidecar, source: str) -> tuple[Measurement, ...]:
    """The results recorded in the sidecar `source`, one measurement per set of images.

    The newest is first; those on held-out images, which training writes, come last.
    Raises ReportError.
    """
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    try:
        for row in sidecar.evaluation:
            key = (str(row.get("data", "")), str(row.get("data_sha256", "")), int(row["n"]))
            groups.setdefault(key, []).append(row)
        return tuple(
            _recorded(name, digest, rows, source)
            for (name, digest, _), rows in reversed(groups.items())
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ReportError(source, "recorded accuracies", f"malformed ones ({error!r})") from None


def _recorded(name: str, digest: str, rows: Sequence[dict[str, Any]], source: str) -> Measurement:
    names = sorted({str(flag) for row in rows for flag in row.get("flags", ())})
    return Measurement(
        source=source,
        data=name or "unnamed data",
        results=tuple(_result(row) for row in rows),
        flags=tuple(
            {"name": flag, "text": f"it was recorded with the flag {flag}", "advice": ""}
            for flag in names
        ),
        manifest={"data": {"name": name, "scored_sha256": digest}},
        recorded=True,
    )


def _counts(row: dict[str, Any]) -> tuple[int, int]:
    """The numbers of correctly classified images and of all. Raises ValueError."""
    correct, n = int(row["correct"]), int(row["n"])
    if not 0 <= correct <= n or n < 1:
        raise ValueError(f"{correct} right of {n} images")
    return correct, n


def _result(row: dict[str, Any]) -> Result:
    correct, n = _counts(row)
    settings = ("alpha", "steps", "restarts", "seed")
    confusion = tuple(tuple(map(int, line)) for line in row.get("confusion") or ())
    if any(len(line) != len(confusion) for line in confusion):
        raise ValueError("a confusion matrix that is not square")
    return Result(
        attack=str(row["attack"]),
        correct=correct,
        n=n,
        interval=wilson_interval(correct, n),
        per_class=tuple(None if v is None else float(v) for v in row.get("per_class") or ()),
        confusion=confusion,
        norm=str(row.get("norm") or ""),
        eps=None if row.get("eps") is None else float(row["eps"]),
        eps_text=str(row.get("eps_text") or ""),
        stages=tuple(
            {"attack": str(stage["attack"]), "correct": int(stage["correct"])}
            for stage in row.get("stages") or ()
        ),
        fooled=tuple(map(int, row["fooled"])) if "fooled" in row and row.get("stages") else None,
        settings={name: row[name] for name in settings if row.get(name) is not None},
        forwards=row.get("forwards"),
        backwards=row.get("backwards"),
        seconds=row.get("seconds"),
    )


def _point(row: dict[str, Any]) -> CurvePoint:
    correct, n = _counts(row)
    return CurvePoint(
        eps=float(row["eps"]),
        eps_text=str(row["eps_text"]),
        correct=correct,
        n=n,
        interval=wilson_interval(correct, n),
    )
