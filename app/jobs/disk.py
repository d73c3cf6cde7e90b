"""Stores jobs in a folder on disk, where they survive a restart."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import sqlite3
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.jobs.store import StoreError
from robust.datasets import Dataset
from robust.files import write_atomic

logger = logging.getLogger(__name__)

VERSION = 1
# Primary result codes: an invalid file, or a table with other columns.
_DAMAGE_CODES = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
_TABLE = "CREATE TABLE IF NOT EXISTS jobs (id TEXT PRIMARY KEY, created REAL, about TEXT)"


class JobFolder:
    """A folder with one SQLite file, and the images and journal of each active job.

    One service at a time uses it. A damaged file is renamed, and a new one created. Raises
    StoreError if the folder is in use, or can't be read and written, such as on a full disk.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, path = folder, folder / "jobs.sqlite"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / "lock").open("w")
        except OSError as error:
            raise StoreError(
                f"{folder}: expected a folder to write to: {error.strerror}"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise StoreError(f"{folder}: another service stores its evaluations there") from None
        try:
            try:
                self._db = _open(path)
            except _DamagedFile as error:
                new = _rename_damaged(path)
                logger.error("%s is damaged (%s); renamed to %s", path, error, new)
                self._db = _open(path)
        except (_DamagedFile, OSError, sqlite3.Error) as error:
            self._lock.close()
            raise StoreError(f"{path}: the evaluations can't be opened: {error}") from error

    def all(self) -> list[tuple[str, dict[str, Any]]]:
        """The id of each job, and everything else as JSON values; oldest first."""
        rows = self._db.execute("SELECT id, about FROM jobs ORDER BY created, id").fetchall()
        return [(id, json.loads(about)) for id, about in rows]

    def sweep(self) -> None:
        """Remove files without a job, which a killed process left behind."""
        known = {id for (id,) in self._db.execute("SELECT id FROM jobs")}
        for path in self._folder.iterdir():
            if path.suffix in (".npz", ".journal", ".tmp") and path.stem not in known:
                path.unlink(missing_ok=True)

    def save(self, id: str, created: float, about: dict[str, Any]) -> None:
        """Add or update a job. Raises StoreError, for example on a full disk."""
        text = json.dumps({"version": VERSION, **about}, allow_nan=False)
        try:
            with self._db:
                self._db.execute(
                    "INSERT OR REPLACE INTO jobs VALUES (?, ?, ?)", (id, created, text)
                )
        except sqlite3.Error as error:
            raise StoreError(f"{self._folder}: a job could not be stored: {error}") from error

    def forget(self, id: str) -> None:
        """Remove a job and its files. Raises StoreError, for example on a full disk."""
        self.release(id)
        try:
            with self._db:
                self._db.execute("DELETE FROM jobs WHERE id = ?", (id,))
        except sqlite3.Error as error:
            raise StoreError(f"{self._folder}: a job could not be removed: {error}") from error

    def release(self, id: str) -> None:
        """Remove the files of a finished job."""
        for path in self._folder.glob(f"{id}.*"):
            path.unlink(missing_ok=True)

    def journal(self, id: str) -> Path:
        """The file of an evaluation's journal."""
        return self._folder / f"{id}.journal"

    def put(self, id: str, dataset: Dataset) -> None:
        """Store the images of a job. Raises StoreError, for example on a full disk."""

        def write(file: io.BufferedIOBase) -> None:
            np.savez(
                file,
                images=dataset.images.numpy(),
                labels=dataset.labels.numpy(),
                classes=np.array(dataset.classes),
                name=np.array(dataset.name),
            )

        try:
            write_atomic(self._images(id), write)  # type: ignore[arg-type]
        except OSError as error:
            self._images(id).unlink(missing_ok=True)
            raise StoreError(
                f"{self._folder}: a dataset could not be stored: {error.strerror}"
            ) from error

    def get(self, id: str) -> Dataset:
        """The images of a job. Raises StoreError if they are missing or damaged."""
        try:
            with np.load(self._images(id), allow_pickle=False) as arrays:
                return Dataset(
                    images=torch.from_numpy(arrays["images"]),
                    labels=torch.from_numpy(arrays["labels"]),
                    classes=tuple(map(str, arrays["classes"])),
                    name=str(arrays["name"]),
                )
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise StoreError(f"{self._images(id)}: expected the images of a job") from error

    def close(self) -> None:
        """Close the database and unlock the folder."""
        self._db.close()
        self._lock.close()

    def _images(self, id: str) -> Path:
        return self._folder / f"{id}.npz"


class _DamagedFile(Exception):
    """The file is not a database of evaluations, or not of this version."""


def _open(path: Path) -> sqlite3.Connection:
    """A connection to the database, which is created if there is none.

    Raises _DamagedFile, or sqlite3.Error for other failures, such as a full disk: the database may
    be valid then.
    """
    db = sqlite3.connect(path, check_same_thread=False)
    try:
        _prepare(db)
    except BaseException:
        db.close()
        raise
    return db


def _prepare(db: sqlite3.Connection) -> None:
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        with db:
            db.execute(_TABLE)
        (state,) = db.execute("PRAGMA quick_check").fetchone()
        if state != "ok":
            raise _DamagedFile(state)
        for (about,) in db.execute("SELECT about FROM jobs"):
            if json.loads(about).get("version") != VERSION:
                raise _DamagedFile("it has another version")
    except json.JSONDecodeError as error:
        raise _DamagedFile(str(error)) from error
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE_CODES:
            raise _DamagedFile(str(error)) from error
        raise


def _rename_damaged(path: Path) -> Path:
    """Rename the file, and return its new path; removes SQLite's files beside it."""
    number = 1
    while (new := path.with_name(f"{path.name}.broken-{number}")).exists():
        number += 1
    os.replace(path, new)
    for ending in ("-wal", "-shm"):
        path.with_name(path.name + ending).unlink(missing_ok=True)
    return new
