"""What an evaluation has finished so far, in a file that survives a kill."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust.attacks import Model

VERSION = 1
Row = tuple[int, int, int, float, int, int, int]  # image and the columns of COLUMNS
COLUMNS = ("fooled", "predicted", "distance", "unheld", "forwards", "backwards")


class JournalError(ValueError):
    """A journal that can't be gone on with; the message says why."""


class Journal:
    """One SQLite file for one evaluation: a row for each image that a stage is through with.

    Raises JournalError where the file belongs to another evaluation, or is none.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self._path = path
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT)")
            columns = ", ".join(f"{name} NUMERIC" for name in COLUMNS)
            self._db.execute(
                f"CREATE TABLE IF NOT EXISTS finished (stage TEXT, image INTEGER, {columns}, "
                "PRIMARY KEY (stage, image)) WITHOUT ROWID"
            )
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS spent (stage TEXT PRIMARY KEY, seconds REAL)"
            )
            self._check({"version": VERSION, **manifest})
        except sqlite3.Error as error:
            raise JournalError(
                f"{path}: expected a journal of an evaluation, or a place for one: {error}"
            ) from error

    def _check(self, manifest: dict[str, Any]) -> None:
        for name, value in manifest.items():
            text = json.dumps(value, sort_keys=True)
            found = self._db.execute("SELECT value FROM about WHERE name = ?", (name,)).fetchone()
            if found is None:
                self._db.execute("INSERT INTO about VALUES (?, ?)", (name, text))
            elif found[0] != text:
                raise JournalError(
                    f"{self._path}: expected a journal of the same evaluation, but its {name} is "
                    f"{_short(found[0])}, not {_short(text)}; give another file"
                )

    def read(self, stage: str) -> tuple[list[Row], float]:
        """What `stage` is through with, and the seconds it took."""
        names = ", ".join(("image", *COLUMNS))
        rows = self._db.execute(f"SELECT {names} FROM finished WHERE stage = ?", (stage,))
        seconds = self._db.execute("SELECT seconds FROM spent WHERE stage = ?", (stage,)).fetchone()
        return rows.fetchall(), seconds[0] if seconds else 0.0

    def write(self, stage: str, rows: Sequence[Row], seconds: float) -> None:
        """Add rows, all or none; `seconds` is what the stage took in all."""
        marks = ", ".join("?" * (2 + len(COLUMNS)))
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(
                f"INSERT OR REPLACE INTO finished VALUES ({marks})",
                [(stage, *row) for row in rows],
            )
            self._db.execute("INSERT OR REPLACE INTO spent VALUES (?, ?)", (stage, seconds))
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise JournalError(f"{self._path}: could not be written: {error}") from error

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()


def model_digest(model: Model) -> str:
    """SHA-256 of a module's state. Raises ValueError for a callable that is none."""
    if not isinstance(model, nn.Module):
        raise ValueError("expected model_id beside a journal: this model is no torch module")
    digest = hashlib.sha256()
    for name, values in model.state_dict().items():
        digest.update(name.encode())
        digest.update(_bytes(values))
    return digest.hexdigest()


def data_digest(images: Tensor, labels: Tensor) -> str:
    """SHA-256 of images and labels in their order."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    digest.update(_bytes(images))
    digest.update(_bytes(labels))
    return digest.hexdigest()


def _bytes(values: Tensor) -> bytes:
    return values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
