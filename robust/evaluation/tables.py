"""An evaluation as the tables that the command line prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from robust.evaluation.intervals import wilson_interval
from robust.tables import table
from robust.threat_model import format_eps

if TYPE_CHECKING:
    from robust.evaluation.result import Evaluation

HEADER = ("attack", "norm", "eps", "accuracy %", "95% interval", "correct", "seconds")
Row = list[str]


def accuracy_table(evaluation: Evaluation, table_format: str = "text") -> str:
    """Clean accuracy, each attack with its stages, and the worst case over several attacks."""
    rows = []
    for item in evaluation.accuracies:
        threat_model = item.attack.threat_model if item.attack else None
        ball = (threat_model.norm, format_eps(threat_model.eps)) if threat_model else ("", "")
        for stage in item.stages:
            label, n = f"  {stage.attack}", evaluation.total  # a finished stage saw all images
            rows.append(_row(label, ball, stage.correct, n, stage.seconds))
        rows.append(_row(item.label, ball, item.correct, item.n, item.seconds))
    if len(evaluation.attacks) > 1:
        rows.append(_row("worst case", ("", ""), evaluation.worst_correct, evaluation.n))
    return table(HEADER, rows, table_format)


def curve_table(evaluation: Evaluation, table_format: str = "text") -> str:
    """Accuracy at each eps of the curve."""
    header = ["eps", *(format_eps(point.eps) for point in evaluation.curve)]
    values = [f"{100 * point.correct / point.n:.1f}" for point in evaluation.curve]
    return table(header, [["accuracy %", *values]], table_format)


def _row(
    label: str, ball: tuple[str, str], correct: int, n: int, seconds: float | None = None
) -> Row:
    low, high = wilson_interval(correct, n)
    accuracy = f"{100 * correct / n:.2f}" if n else ""
    interval = f"{100 * low:.1f} to {100 * high:.1f}"
    spent = "" if seconds is None else f"{seconds:.1f}"
    return [label, *ball, accuracy, interval, f"{correct}/{n}", spent]
