"""The records of a training run: its manifest and the metrics of each epoch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust import files
from robust.sidecar import Sidecar

MANIFEST, METRICS = "run.json", "metrics.jsonl"


class ReportError(ValueError):
    """A file can't be used for a report: names it, what was expected and what was found."""

    def __init__(self, source: Path | str, expected: str, found: str) -> None:
        super().__init__(f"{source}: expected {expected}, found {found}")


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A finished run: `manifest` has recipe, data, seed and versions; `epochs` has the metrics."""

    name: str
    manifest: dict[str, Any]
    epochs: tuple[dict[str, Any], ...]


def read_run(folder: Path) -> TrainingRun:
    """Read the folder ``runs/NAME`` of `robust train`. Raises ReportError."""
    if not folder.is_dir():
        found = "a file" if folder.exists() else "none of that name"
        raise ReportError(folder, "the folder of a training run, such as runs/NAME", found)
    path = folder / MANIFEST
    try:
        manifest = files.read_json(path)
    except FileNotFoundError:
        raise ReportError(folder, f"a training run with its {MANIFEST}", "none") from None
    except ValueError as error:
        raise ReportError(path, "JSON", f"incomplete or malformed text: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("recipe"), dict):
        raise ReportError(path, "the recipe of a run", "none")
    epochs = _read_metrics(folder / METRICS)
    if not manifest.get("finished"):
        raise ReportError(
            folder,
            "a finished run",
            f"one that stopped after {len(epochs)} epochs; robust train --resume continues it",
        )
    return TrainingRun(name=folder.resolve().name, manifest=manifest, epochs=epochs)


def _read_metrics(path: Path) -> tuple[dict[str, Any], ...]:
    try:
        lines = path.read_bytes().decode().splitlines()
    except FileNotFoundError:
        raise ReportError(path.parent, f"a training run with its {METRICS}", "none") from None
    except UnicodeDecodeError:
        raise ReportError(path, "lines of JSON", "bytes that are not text") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            shown = line[-20:]
            found = f"an incomplete or malformed line {number}, at {shown!r}"
            raise ReportError(path, "a JSON object in each line", found) from None
        if not isinstance(row, dict) or not isinstance(row.get("epoch"), int):
            raise ReportError(path, "an epoch in each line", f"none in line {number}")
        rows.append(row)
    return tuple(rows)


def check_belongs(run: TrainingRun, sidecar: Sidecar, checkpoint: Path) -> None:
    """Raise ReportError unless this run wrote the checkpoint."""
    added = ("kept_epoch", "init", "validation", "minutes")  # added to the recipe by the run
    recipe = {name: value for name, value in sidecar.recipe.items() if name not in added}
    data = None if sidecar.data is None else vars(sidecar.data)
    for name, found in (("recipe", recipe), ("data", data), ("seed", sidecar.seed)):
        if run.manifest.get(name) != found:
            raise ReportError(
                checkpoint, f"the checkpoint of the run {run.name}", f"one of another {name}"
            )
