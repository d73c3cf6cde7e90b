"""Atomic file writes: a crash or a full disk leaves the old file intact.

New content goes to a temporary file ``.NAME.XXXXXXXX.tmp`` in the same folder, which is locked
until it is renamed. An unlocked one belongs to a killed process, and the next write of the same
file removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

_locks: dict[Path, int] = {}  # file descriptors that hold the locks of this process's staged files


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write `path` through a temporary file in its folder, flushed to disk and renamed over it.

    Raises OSError, and removes the temporary file, if anything goes wrong.
    """
    temporary = stage(path, write)
    try:
        commit(temporary, path)
    except BaseException:
        discard(temporary)
        raise


def stage(path: Path, write: Callable[[IO[bytes]], object]) -> Path:
    """Write the new content of `path` to a temporary file in its folder and return that file.

    The caller passes it to `commit` or `discard`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary, lock = _create_locked(path)
    _locks[temporary] = lock
    try:
        with os.fdopen(os.dup(lock), "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp's own 0600 would lock other users out
    except BaseException as error:
        discard(temporary)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # the error of a full disk names no file
        raise
    return temporary


def commit(temporary: Path, path: Path) -> None:
    """Rename `temporary` over `path` and flush the folder, so that the rename survives a crash."""
    os.replace(temporary, path)
    _unlock(temporary)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def discard(temporary: Path) -> None:
    """Remove a staged file that is not needed."""
    temporary.unlink(missing_ok=True)
    _unlock(temporary)


def remove_leftovers(path: Path) -> None:
    """Remove temporary files of `path` whose process was killed, but not those in use."""
    for name in glob.glob(f".{glob.escape(path.name)}.????????.tmp", root_dir=path.parent):
        with contextlib.suppress(OSError):  # in use, gone by now, or not ours to remove
            handle = os.open(path.parent / name, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                (path.parent / name).unlink()
            finally:
                os.close(handle)


def _create_locked(path: Path) -> tuple[Path, int]:
    """A new temporary file and a descriptor that holds its lock."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if Path(name).exists():
            return Path(name), handle
        os.close(handle)  # `remove_leftovers` of another process came before the lock


def _unlock(temporary: Path) -> None:
    handle = _locks.pop(temporary, None)
    if handle is not None:
        os.close(handle)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, waiting for other processes and threads that hold it.

    Raises OSError if the folder can't be opened.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # also releases the lock


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data`, atomically. Raises OSError."""
    write_atomic(path, lambda file: file.write(data))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises OSError."""
    write_bytes(path, to_json(value))


def to_json(value: Any) -> bytes:
    """`value` as indented JSON with a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def from_json(data: bytes) -> Any:
    """The value of JSON text. Raises ValueError."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("brackets nested too deep") from None


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises OSError, and ValueError for invalid JSON."""
    return from_json(path.read_bytes())


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
