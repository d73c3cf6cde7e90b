"""Clean and robust accuracy of a model, with warnings about unreliable numbers."""

from robust.evaluation.flags import find_flags
from robust.evaluation.intervals import wilson_interval
from robust.evaluation.journal import JournalError
from robust.evaluation.result import (
    Accuracy,
    CurvePoint,
    Distances,
    Evaluation,
    Flag,
    Probes,
    StageAccuracy,
)
from robust.evaluation.run import evaluate, evaluate_batches

__all__ = [
    "Accuracy",
    "CurvePoint",
    "Distances",
    "Evaluation",
    "Flag",
    "JournalError",
    "Probes",
    "StageAccuracy",
    "evaluate",
    "evaluate_batches",
    "find_flags",
    "wilson_interval",
]
