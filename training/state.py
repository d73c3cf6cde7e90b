"""What a run keeps on disk so that it can go on after a kill, and the lock of its output."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust import files


class TrainingError(ValueError):
    """A run that can't start or go on; the message says why and what to do."""


@dataclass(kw_only=True)
class Best:
    """The kept model so far."""

    score: float
    epoch: int
    weights: dict[str, Tensor]


@dataclass(kw_only=True)
class RunState:
    """Where a run stands: everything that the next step depends on.

    Random numbers are derived from seed and position, so none need to be kept.
    """

    phase: int = 0
    epoch: int = 0  # within the phase
    step: int = 0  # within the epoch
    seconds: float = 0.0  # of training so far
    epoch_loss: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: Best | None = None
    model: dict[str, Tensor] = field(default_factory=dict)
    averaged: dict[str, Tensor] = field(default_factory=dict)
    averaged_steps: int = 0
    optimizer: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The files of a run, in ``runs/NAME`` beside the checkpoint ``NAME.pt``."""

    path: Path
    out: Path  # the checkpoint

    @classmethod
    def of(cls, out: Path) -> RunFolder:
        """The folder of the run that writes `out`."""
        return cls(path=out.parent / "runs" / out.stem, out=out)

    @property
    def state(self) -> Path:
        """State of an unfinished run."""
        return self.path / "state.pt"

    @property
    def manifest(self) -> Path:
        """Resolved recipe, data, seed and versions."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """One JSON line an epoch."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    def read_manifest(self) -> dict[str, Any]:
        """The run that the folder is of; empty where there is none. Raises TrainingError."""
        if not self.manifest.exists():
            return {}
        try:
            return dict(files.read_json(self.manifest))
        except (TypeError, ValueError) as error:
            raise TrainingError(
                f"{self.manifest}: expected the record of a run, found a damaged file ({error}); "
                "remove that folder to start over"
            ) from error

    def put_aside(self) -> None:
        """Move what an earlier, finished run left to ``runs/NAME.1``, or the next free number."""
        if not self.metrics.exists() or not self.metrics.stat().st_size:
            return
        numbered = (self.path.with_name(f"{self.path.name}.{k}") for k in count(1))
        aside = next(path for path in numbered if not path.exists())
        aside.mkdir()
        for path in (self.manifest, self.metrics, self.tensorboard):
            if path.exists():
                path.rename(aside / path.name)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for one process. Raises TrainingError while another holds it.

        What a process killed in the midst of writing left there is removed.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            reason = error.strerror or str(error)
            raise TrainingError(
                f"{self.path}: expected a folder that can be written to, found: {reason.lower()}"
            ) from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TrainingError(
                    f"{self.path}: another training run is writing here; "
                    "wait for it, or choose another --out"
                ) from None
            for left in self.path.glob(".*.tmp"):
                left.unlink(missing_ok=True)
            yield
        finally:
            os.close(handle)  # also gives the lock back, as does the end of the process


def save_state(path: Path, state: RunState) -> None:
    """Write the state atomically. Raises TrainingError when the disk is full."""
    content = {**vars(state), "history": json.dumps(state.history)}
    content["best"] = vars(state.best) if state.best else None
    try:
        files.write_atomic(path, lambda file: torch.save(content, file))
    except (OSError, RuntimeError) as error:  # torch's zip writer wraps a full disk
        reason = str(error).splitlines()[0]
        raise TrainingError(f"{path}: could not save the state of the run: {reason}") from error


def load_state(path: Path) -> RunState:
    """Read a state back. Raises TrainingError for a damaged file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["history"] = json.loads(content["history"])
        content["best"] = Best(**content["best"]) if content["best"] else None
        return RunState(**content)
    except Exception as error:
        raise TrainingError(
            f"{path}: expected the state of a run, found a damaged file "
            f"({type(error).__name__}); remove it to start over"
        ) from error
