"""A file with the finished part of an evaluation, which survives a kill."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from robust.attack_registry import REGISTRY
from robust.attacks import AttackSettings, Model, resolve_attack
from robust.digest import module_digest, tensor_bytes
from robust.threat_model import format_eps

VERSION = 1
_SHARD = re.compile(r"\.\d+-of-(\d+)")  # ending of the file of one process
APPLICATION = 0x526F6275  # application id in SQLite's header, which identifies a journal
Row = tuple[int, int, int, float, int, int, int]  # image and the columns of COLUMNS
# Settings in a recorded attack, see `attack_text`; those that determine others come first.
_FIELD = re.compile(r"(\w+)=('[^']*'|[-+.\w]+)(?=[,)])")
_SETTINGS = ("norm", "eps", "steps", "restarts", "seed")
_QUOTE = "'"
COLUMNS = ("fooled", "predicted", "distance", "unheld", "forwards", "backwards")


class JournalError(ValueError):
    """A journal that can't be resumed; the message says why."""


class Journal:
    """One SQLite file for one evaluation: a row for each image that has finished a stage.

    Locked until `close` or the end of the process: two evaluations never write to one file.

    Raises JournalError if another evaluation has it open, if it belongs to another evaluation, or
    if it is not a journal or can't be written.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self._path = path
        with _sqlite_errors(path, "could not be opened"):
            self._db = sqlite3.connect(
                path, isolation_level=None, timeout=0, check_same_thread=False
            )
        try:
            with _sqlite_errors(path, "could not be opened"):
                # No write-ahead log: a second file can get lost, and it fails on network disks.
                self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
                self._db.execute("BEGIN EXCLUSIVE")
                self._prepare()
                self._check({"version": VERSION, **manifest})
                self._db.execute("COMMIT")
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        """Create the tables of a new file. Raises JournalError if the file is not a journal."""
        if self._db.execute("PRAGMA application_id").fetchone()[0] == APPLICATION:
            return
        if self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise JournalError(
                f"{self._path}: expected a journal of an evaluation, got another SQLite database"
            )
        columns = ", ".join(f"{name} NUMERIC" for name in COLUMNS)
        self._db.execute(f"PRAGMA application_id={APPLICATION}")
        self._db.execute("CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT)")
        self._db.execute(
            f"CREATE TABLE finished (stage TEXT, image INTEGER, {columns}, "
            "PRIMARY KEY (stage, image)) WITHOUT ROWID"
        )
        self._db.execute("CREATE TABLE spent (stage TEXT PRIMARY KEY, seconds REAL)")

    def _check(self, manifest: dict[str, Any]) -> None:
        for name, value in manifest.items():
            text = json.dumps(value, sort_keys=True)
            found = self._db.execute("SELECT value FROM about WHERE name = ?", (name,)).fetchone()
            if found is None:
                self._db.execute("INSERT INTO about VALUES (?, ?)", (name, text))
            elif found[0] != text:
                difference = _difference(name, json.loads(found[0]), json.loads(text))
                raise JournalError(
                    f"{self._path}: expected a journal of the same evaluation, but its "
                    f"{difference}; give another file"
                )

    def read(self, stage: str, *, images: int) -> tuple[list[Row], float]:
        """The rows of `stage` and the seconds it took."""
        names = ", ".join(("image", *COLUMNS))
        with _sqlite_errors(self._path, "could not be read"):
            rows: list[Row] = self._db.execute(
                f"SELECT {names} FROM finished WHERE stage = ?", (stage,)
            ).fetchall()
            spent = self._db.execute(
                "SELECT seconds FROM spent WHERE stage = ?", (stage,)
            ).fetchone()
        for row in rows:
            numbers = all(isinstance(value, int | float) for value in row)
            if not numbers or not 0 <= row[0] < images:
                raise JournalError(f"{self._path}: is damaged: it has a row {row}")
        return rows, spent[0] if spent else 0.0

    def write(self, stage: str, rows: Sequence[Row], seconds: float) -> None:
        """Add rows atomically; `seconds` is the time of the attack, earlier stages included."""
        marks = ", ".join("?" * (2 + len(COLUMNS)))
        try:
            with _sqlite_errors(self._path, "could not be written"):
                self._db.execute("BEGIN IMMEDIATE")
                self._db.executemany(
                    f"INSERT OR REPLACE INTO finished VALUES ({marks})",
                    [(stage, *row) for row in rows],
                )
                self._db.execute("INSERT OR REPLACE INTO spent VALUES (?, ?)", (stage, seconds))
                self._db.execute("COMMIT")
        except JournalError:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def close(self) -> None:
        """Close and unlock the file."""
        self._db.close()


def check_processes(path: Path, *, size: int) -> None:
    """Raise JournalError if the journal at `path` was started by a different number of processes.

    Each process has its own file, ``NAME.1-of-2``, and its own shard of the images.
    """
    found = set()
    for other in path.parent.glob("*") if path.parent.is_dir() else ():
        shard = _SHARD.fullmatch(other.name.removeprefix(path.name))
        if shard and other.name.startswith(path.name):
            found.add(int(shard[1]))
    if path.exists():
        found.add(1)
    if found and size not in found:
        started = ", ".join(map(str, sorted(found)))
        raise JournalError(
            f"{path}: expected as many processes as started the journal, {started}, got {size}; "
            "start as many again, or give another file"
        )


def recorded(path: Path, name: str) -> Any:
    """The value of `name` recorded in the journal at `path`; None if there is no journal.

    Raises JournalError if another evaluation has it open, or if it can't be read.
    """
    if not path.is_file() or not path.stat().st_size:
        return None
    with _sqlite_errors(path, "could not be read"), closing(sqlite3.connect(path, timeout=0)) as db:
        if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION:
            return None
        found = db.execute("SELECT value FROM about WHERE name = ?", (name,)).fetchone()
    return json.loads(found[0]) if found else None


def count_rows(path: Path) -> int:
    """The number of rows in the journal at `path`; 0 if there is none, or if it can't be read."""
    if not path.is_file():
        return 0
    with suppress(sqlite3.Error), closing(sqlite3.connect(path, timeout=0)) as db:
        return int(db.execute("SELECT count(*) FROM finished").fetchone()[0])
    return 0


@contextmanager
def _sqlite_errors(path: Path, what: str) -> Iterator[None]:
    """Turn SQLite's exceptions into JournalError."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_BUSY:
            raise JournalError(
                f"{path}: is in use by another evaluation; wait for it, or give another file"
            ) from error
        if code == sqlite3.SQLITE_NOTADB:
            raise JournalError(f"{path}: expected a journal of an evaluation: {error}") from error
        raise JournalError(f"{path}: {what}: {error}") from error


def attack_text(attack: AttackSettings) -> str:
    """The text that records an attack, with its stages if they are not the default ones."""
    text, usual = str(attack), resolve_attack(attack.name, attack.threat_model, seed=attack.seed)
    if attack.own_stages == usual.own_stages:
        return text
    return f"{text[:-1]}, stages='{', '.join(stage.label for stage in attack.stages)}')"


def model_digest(model: Model) -> str:
    """SHA-256 of a module. Raises ValueError for any other callable."""
    if not isinstance(model, nn.Module):
        raise ValueError("expected a model_id with a journal, as this model is not a torch module")
    return module_digest(model)


def data_digest(images: Tensor, labels: Tensor) -> str:
    """SHA-256 of images and labels in their order."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    digest.update(tensor_bytes(images))
    digest.update(tensor_bytes(labels))
    return digest.hexdigest()


def _difference(name: str, was: Any, now: Any) -> str:
    """What differs, such as ``eps of pgd is 8/255, not 4/255``."""
    if name != "attacks":
        return f"{name} is {_shortened(was)}, not {_shortened(now)}"
    before, after = ([dict(_FIELD.findall(text)) for text in texts] for texts in (was, now))
    names, others = ([fields.get("name") for fields in attacks] for attacks in (before, after))
    if names != others:
        return f"attacks are {_labels(before)}, not {_labels(after)}"
    for one, other in zip(before, after, strict=True):
        for key in (*_SETTINGS, *one, *other):
            if one.get(key) != other.get(key):
                missing = "the default" if key == "stages" else "none"
                old, new = _shown(key, one.get(key, missing), other.get(key, missing))
                return f"{key} of {one['name'].strip(_QUOTE)} is {old}, not {new}"
    return "attacks are those of another version"


def _shortened(value: object) -> str:
    text = str(value)
    return f"{text[:12]}..." if re.fullmatch("[0-9a-f]{64}", text) else text[:90]


def _labels(attacks: list[dict[str, str]]) -> str:
    """The attacks' names with their steps, as on the command line."""
    labels = []
    for fields in attacks:
        name = fields.get("name", "none").strip(_QUOTE)
        counted = name in REGISTRY and "steps" in REGISTRY[name].parameters
        labels.append(f"{name}-{fields.get('steps')}" if counted else name)
    return ", ".join(labels) or "none"


def _shown(key: str, *values: str) -> list[str]:
    """The values of a setting as the user writes them, or exactly if that looks the same."""
    shown = [value.strip(_QUOTE) for value in values]
    if key in ("eps", "alpha") and "none" not in values:
        sizes = [format_eps(float(value)) for value in values]
        return sizes if len(set(sizes)) > 1 else shown
    return shown
