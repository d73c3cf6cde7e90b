"""The input of a reader: the location of the data, the image size, and the limits."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from robust.datasets.archive import MAX_BYTES, MAX_MEMBERS, Archive, open_archive
from robust.datasets.errors import DatasetError, TooManyToFit
from robust.image_headers import MAX_PIXELS

TRAIN, TEST = ("train",), ("test", "validation", "valid", "val")  # names of splits, best first


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on one dataset. The defaults are for the user's own files."""

    max_images: int | None = None
    max_fitted: int | None = None
    """Images that are resized one by one, which takes some 50 us each."""
    max_bytes: int = MAX_BYTES
    """Decompressed bytes of an archive, and bytes of the resulting images."""
    max_pixels: int = MAX_PIXELS
    """Width times height of an image before it is resized."""
    max_members: int = MAX_MEMBERS
    """Files in an archive."""
    max_steps: int = sys.maxsize
    """Operations of a pickle."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A dataset to read."""

    name: str
    """The name in messages and in the Dataset."""
    size: int
    """Width and height in pixels of the resulting images."""
    path: Path | None = None
    """The file or folder; None for an upload or a name."""
    data: bytes | None = None
    """The bytes of an upload."""
    train: bool = True
    """Whether to read the training split of data that has two."""
    limits: Limits = field(default_factory=Limits)

    @cached_property
    def content(self) -> bytes:
        """All bytes of the file."""
        if self.data is not None:
            return self.data
        assert self.path is not None
        return self.path.read_bytes()

    def head(self, count: int) -> bytes:
        """The first `count` bytes of the file."""
        if self.data is not None:
            return self.data[:count]
        assert self.path is not None
        with self.path.open("rb") as file:
            return file.read(count)

    @contextmanager
    def archive(self) -> Iterator[Archive]:
        """The file as a zip within the limits. Raises DatasetError."""
        file = self.path if self.data is None else io.BytesIO(self.data)
        assert file is not None
        limits = self.limits
        with open_archive(
            self.name, file, max_bytes=limits.max_bytes, max_members=limits.max_members
        ) as archive:
            yield archive

    def error(self, expected: str, found: str) -> DatasetError:
        """An error that names this source."""
        return DatasetError(self.name, expected=expected, found=found)

    def split_note(self, read: str, other: str) -> str:
        """The entry of `Dataset.changes` for data of which only one split was read."""
        option = "train=False" if self.train else "--train or train=True"
        how = "" if self.data is not None else f" ({option} reads that)"
        return f"read {read}, not {other}{how}"

    def check_count(self, count: int) -> None:
        """Raise DatasetError if there are more images than the limit, or none."""
        if count == 0:
            raise self.error("at least one image", "none")
        limit = self.limits.max_images
        if limit is not None and count > limit:
            raise self.error(f"at most {limit} images", str(count))

    def check_fitted(self, count: int) -> None:
        """Raise TooManyToFit if more images need resizing than the limit."""
        limit = self.limits.max_fitted
        if limit is not None and count > limit:
            raise TooManyToFit(self.name, expected=f"at most {limit} to resize", found=str(count))

    def check_output(self, count: int, bytes_per_value: int) -> None:
        """Raise DatasetError if `count` images at `size` would need more memory than the limit."""
        total = count * 3 * self.size**2 * bytes_per_value
        if total > self.limits.max_bytes:
            raise self.error(f"at most {self.limits.max_bytes} bytes of images", f"{total} bytes")
