"""Writing files so that a crash or a full disk leaves the old one whole."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write through a temporary file beside `path`, flushed to disk, then renamed over it.

    Raises OSError and removes the temporary file when anything goes wrong.
    """
    temporary = stage(path, write)
    try:
        commit(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def stage(path: Path, write: Callable[[IO[bytes]], object]) -> Path:
    """Write the new content of `path` to a temporary file beside it and return that file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp's own 0600 would lock other users out
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say for which file
        raise
    return temporary


def commit(temporary: Path, path: Path) -> None:
    """Rename `temporary` over `path` and flush the folder, so that the rename survives a crash."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises OSError."""
    write_atomic(path, lambda file: file.write(to_json(value)))


def to_json(value: Any) -> bytes:
    """`value` as indented JSON with a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def from_json(data: bytes) -> Any:
    """The value of JSON text. Raises ValueError."""
    return json.loads(data)


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises OSError, and ValueError for text that is no JSON."""
    return from_json(path.read_bytes())


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
