"""The files of a run, the state that lets it resume after a kill, and the lock of its output."""

from __future__ import annotations

import fcntl
import filecmp
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust import files
from robust.checkpoint import sidecar_path


class TrainingError(ValueError):
    """A run can't start or continue; the message says why and what to do."""


@dataclass(kw_only=True)
class Best:
    """The best model so far."""

    score: float
    epoch: int
    weights: dict[str, Tensor]


@dataclass(kw_only=True)
class RunState:
    """The position of a run and everything that its next step depends on.

    Random numbers derive from seed and position, so no random state is stored.
    """

    phase: int = 0
    epoch: int = 0  # within the phase
    step: int = 0  # within the epoch
    phase_steps: int = 0  # as fitted by `--minutes`; 0: the steps of all its epochs
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
        """The content of `manifest`; empty if there is no such file. Raises TrainingError."""
        if not self.manifest.exists():
            return {}
        try:
            return dict(files.read_json(self.manifest))
        except (TypeError, ValueError) as error:
            raise TrainingError(
                f"{self.manifest}: expected the record of a run, found a damaged file ({error}); "
                "remove that folder to start over"
            ) from error

    def archive_previous_run(self) -> Path | None:
        """Keep what an earlier run wrote in ``runs/NAME.1``, or the next number; returns it.

        The run's files are moved there. The checkpoint is copied if no archive has it yet, as it
        stays in use until the new one replaces it. Returns None if there is nothing to keep.
        """
        finished = self.metrics.exists() and self.metrics.stat().st_size
        archives = [self.path.with_name(f"{self.path.name}.{k}") for k in range(1, 1000)]
        kept = self.out.exists() and not any(
            (archive / self.out.name).exists()
            and filecmp.cmp(self.out, archive / self.out.name, shallow=False)
            for archive in archives
        )
        if not finished and not kept:
            return None
        archive = next(path for path in archives if not path.exists())
        archive.mkdir()
        if finished:
            for path in (self.manifest, self.metrics, self.tensorboard):
                if path.exists():
                    path.rename(archive / path.name)
        if kept:
            for path in (self.out, sidecar_path(self.out)):
                if path.exists():
                    shutil.copyfile(path, archive / path.name)
        return archive

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for one process. Raises TrainingError while another has it locked.

        Removes temporary files of a process that was killed while writing, and at the end the
        folder itself if it is empty.
        """
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            handle = self._lock()
        except OSError as error:
            reason = error.strerror or str(error)
            raise TrainingError(
                f"{self.path}: expected a folder that can be written to, found: {reason.lower()}"
            ) from error
        try:
            for leftover in self.path.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
            yield
        finally:
            with suppress(OSError):  # a folder that is not empty stays
                if os.listdir(self.path) == ["lock"]:
                    (self.path / "lock").unlink()
                    for folder in missing or [self.path]:
                        folder.rmdir()
            os.close(handle)  # also releases the lock, as does the end of the process

    def _lock(self) -> int:
        """A descriptor that holds the lock. Raises OSError, and TrainingError."""
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                raise TrainingError(
                    f"{self.path}: another training run is writing here; "
                    "wait for it, or choose another --out"
                ) from None
            if os.fstat(handle).st_nlink:
                return handle
            os.close(handle)  # another process has just removed it with the empty folder


class StateWriter:
    """Writes the state of a run in a background thread, so that training continues meanwhile.

    A failed write raises TrainingError at the next call.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="save-state")
        self._pending: Future[None] | None = None

    def __enter__(self) -> StateWriter:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self.wait()

    def save(self, state: RunState) -> None:
        """Copy `state` to the host and start writing it; the original may then change."""
        self.wait()
        content, copied = _host_copy(_to_content(state))
        self._pending = self._pool.submit(self._write, content, copied)

    def check(self) -> None:
        """Raise TrainingError if the last write has failed."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the state is on disk. Raises TrainingError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, content: dict[str, Any], copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        _write_content(self.path, content)


def _to_content(state: RunState) -> dict[str, Any]:
    content = {**vars(state), "history": json.dumps(state.history)}
    content["best"] = dict(vars(state.best)) if state.best else None
    return content


def _write_content(path: Path, content: dict[str, Any]) -> None:
    try:
        files.write_atomic(path, lambda file: torch.save(content, file))
    except (OSError, RuntimeError) as error:  # torch's zip writer wraps a full disk
        reason = str(error).splitlines()[0]
        raise TrainingError(f"{path}: could not save the state of the run: {reason}") from error


def _host_copy(content: dict[str, Any]) -> tuple[dict[str, Any], torch.cuda.Event | None]:
    """`content` with every tensor copied to the host, and on CUDA the event of the last copy.

    On CUDA the copies are asynchronous: later kernels run after them, and the host does not wait.
    """
    on_cuda = False

    def copy(value: Any) -> Any:
        nonlocal on_cuda
        if isinstance(value, Tensor):
            on_cuda = on_cuda or value.is_cuda
            value = value.detach()
            return value.clone() if value.is_cpu else value.to("cpu", non_blocking=value.is_cuda)
        if isinstance(value, dict):
            return {key: copy(item) for key, item in value.items()}
        if isinstance(value, list):
            return [copy(item) for item in value]
        return value

    copied: dict[str, Any] = copy(content)
    if not on_cuda:
        return copied, None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return copied, event


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
