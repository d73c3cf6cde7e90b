"""Reads zip files in memory and within limits."""

import io
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from robust.datasets.errors import DatasetError

MAX_MEMBERS = 2_000_000
MAX_BYTES = 64 << 30

_ENTRY = b"PK\x01\x02"  # start of each entry of the directory, which zipfile parses as a whole
_PART_BYTES = 1 << 24
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, ValueError)


class Archive:
    """A zip file whose declared sizes have been checked."""

    def __init__(self, source: str, file: zipfile.ZipFile) -> None:
        self.source = source
        self._file = file
        infos = {info.filename: info for info in file.infolist()}
        self.members = {name: info for name, info in infos.items() if name[-1:] != "/"}
        self.folders = [name for name in infos if name[-1:] == "/"]

    def read(self, name: str, limit: int | None = None) -> bytearray:
        """The bytes of a member, or the first `limit` of them, in memory that arrays can share.

        Raises DatasetError if the member is missing, damaged or encrypted.
        """
        if name not in self.members:
            raise DatasetError(self.source, expected=f"a member {name}", found="none")
        info = self.members[name]
        # Always with a size: a member may contain far more than it declares.
        left = info.file_size if limit is None else min(limit, info.file_size)
        data = bytearray()
        with _broken_archive(self.source), self._file.open(info) as member:
            while left and (part := member.read(min(left, _PART_BYTES))):
                data += part
                left -= len(part)
        if left:
            found = f"a damaged one ({name} ends early)"
            raise DatasetError(self.source, expected="a complete zip file", found=found)
        return data


@contextmanager
def open_archive(
    source: str,
    file: Path | IO[bytes],
    *,
    max_bytes: int = MAX_BYTES,
    max_members: int = MAX_MEMBERS,
) -> Iterator[Archive]:
    """Open a zip file of at most `max_members` members and `max_bytes` after decompression.

    Nothing is ever extracted to disk. Raises DatasetError for a file that is broken, encrypted,
    over the limits, or has duplicate member names.
    """
    with _broken_archive(source):
        if isinstance(file, io.BytesIO) and file.getvalue().count(_ENTRY) > max_members:
            raise DatasetError(source, expected=f"at most {max_members} members", found="more")
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
        if any(not info.filename for info in infos):
            raise DatasetError(source, expected="a zip file", found="a member without a name")
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
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the file can't be opened: `load_dataset` says why
        expected, found = "a complete zip file", f"a damaged one ({type(error).__name__})"
        raise DatasetError(source, expected=expected, found=found) from None
