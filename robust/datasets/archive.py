"""Zip containers, read in memory and within limits."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from robust.datasets.errors import DatasetError

MAX_MEMBERS = 2_000_000
MAX_BYTES = 64 << 30

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, ValueError)


class Archive:
    """A zip file whose declared sizes were checked before anything was inflated."""

    def __init__(self, source: str, file: zipfile.ZipFile) -> None:
        self.source = source
        self._file = file
        self.members = {info.filename: info for info in file.infolist() if not info.is_dir()}

    def read(self, name: str) -> bytes:
        """Read a member; raises DatasetError when it is missing, damaged or encrypted."""
        if name not in self.members:
            raise DatasetError(self.source, expected=f"a member {name}", found="none")
        info = self.members[name]
        with _broken_archive(self.source), self._file.open(info) as member:
            # Told how much, or a member that holds more than it declares is inflated whole.
            return member.read(info.file_size)


@contextmanager
def open_archive(
    source: str,
    file: Path | IO[bytes],
    *,
    max_bytes: int = MAX_BYTES,
    max_members: int = MAX_MEMBERS,
) -> Iterator[Archive]:
    """Open a zip file of at most `max_members` members and `max_bytes` once inflated.

    Nothing is ever extracted to disk. Raises DatasetError for a file that is broken, encrypted,
    over the limits, or names a member twice.
    """
    with _broken_archive(source):
        opened = zipfile.ZipFile(file)
    with opened:
        infos = opened.infolist()
        if len(infos) > max_members:
            found = f"{len(infos)} members"
            raise DatasetError(source, expected=f"at most {max_members} members", found=found)
        total = sum(info.file_size for info in infos)
        if total > max_bytes:
            expected = f"at most {max_bytes} bytes uncompressed"
            raise DatasetError(source, expected=expected, found=f"{total} bytes")
        if any(info.compress_type not in _METHODS or info.flag_bits & 1 for info in infos):
            expected = "stored or deflated members"
            raise DatasetError(source, expected=expected, found="another method or encryption")
        if len({info.filename for info in infos}) < len(infos):
            raise DatasetError(source, expected="a zip file", found="a member named twice")
        yield Archive(source, opened)


@contextmanager
def _broken_archive(source: str) -> Iterator[None]:
    try:
        yield
    except DatasetError:
        raise
    except _BROKEN as error:
        expected, found = "a complete zip file", f"a damaged one ({type(error).__name__})"
        raise DatasetError(source, expected=expected, found=found) from None
