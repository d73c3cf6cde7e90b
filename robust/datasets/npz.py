"""NumPy's .npy and .npz, read without pickle and without trusting a declared shape."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from robust.datasets.archive import Archive
from robust.datasets.arrays import check_image_shape, dataset_from_arrays
from robust.datasets.dataset import Dataset
from robust.datasets.fields import class_name_field, image_and_label_names, split_notes
from robust.datasets.source import Source

LABELS_FILE = "labels.npy"

_HEADER = re.compile(
    rb"\{\s*'descr':\s*'([<>|=]?)([a-zA-Z])(\d*)',\s*'fortran_order':\s*(True|False),"
    rb"\s*'shape':\s*\(([\d\s,]{0,200})\),?\s*\}\s*"
)
_LONGEST_HEADER = 1 << 16


@dataclass(frozen=True, kw_only=True)
class ArrayHeader:
    """The header of a .npy, which matches the length of the file."""

    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    fortran: bool
    start: int
    """Offset of the values in bytes."""


def read_npz(source: Source) -> Dataset:
    """Build a Dataset of arrays named as in `fields.py`, with class names if there are any.

    Labels may also be in `labels.npy` in the same folder. Raises DatasetError if an array is
    missing, damaged, an object array or of the wrong shape or type.
    """
    with source.archive() as archive:
        arrays = [name.removesuffix(".npy") for name in archive.members if name.endswith(".npy")]
        separate = labels_file(source)
        images, labels = image_and_label_names(
            source, arrays, labels_elsewhere=separate is not None
        )
        notes, classes = split_notes(source, arrays, images), class_name_field(arrays)
        pixels = _read_member(source, archive, images, are_images=True)
        if labels is not None:
            targets = _read_member(source, archive, labels)
        else:
            assert separate is not None
            targets = read_npy_file(source, separate)
            notes.append(f"read the labels from {separate.name}")
        names = None if classes is None else _texts(source, _read_member(source, archive, classes))
    return dataset_from_arrays(source, images=pixels, labels=targets, classes=names, changes=notes)


def labels_file(source: Source) -> Path | None:
    """`labels.npy` in the folder of a file; None if there is none, and for uploads."""
    path = source.path and source.path.parent / LABELS_FILE
    return path if path is not None and path.is_file() and path != source.path else None


def read_npy_file(source: Source, path: Path) -> npt.NDArray[np.generic]:
    """The array in a .npy file. Raises DatasetError, and for an unreadable file OSError."""
    data = path.read_bytes()
    header = parse_header(source, path.name, data[:_LONGEST_HEADER], len(data))
    return _values(header, data)


def parse_header(source: Source, name: str, head: bytes | bytearray, length: int) -> ArrayHeader:
    """Parse the first bytes of a .npy of `length` bytes. Raises DatasetError."""

    def bad(found: str) -> Exception:
        return source.error(f"a plain array in {name}", found)

    if head[:6] != b"\x93NUMPY" or len(head) < 12:
        raise bad("no array header")
    start, width = (10, 2) if head[6] == 1 else (12, 4)
    end = start + int.from_bytes(head[8 : 8 + width], "little")
    if head[6] not in (1, 2):
        raise bad("a header of another version")
    match = _HEADER.fullmatch(head, start, min(end, len(head)))
    if match is None:
        raise bad("a header of another form (records and objects are refused)")
    order, kind, bits, fortran, sides = (group.decode() for group in match.groups())
    if kind not in "biufU":
        raise bad("an object array" if kind == "O" else "an array of another type")
    try:
        dtype = np.dtype(order + kind + bits)
        shape = tuple(int(side) for side in sides.split(",") if side.strip())
    except (TypeError, ValueError):
        raise bad("an invalid header") from None
    if len(shape) > 8 or dtype.itemsize == 0 or math.prod(shape) * dtype.itemsize != length - end:
        raise bad(f"{length - end} bytes for a shape of {len(shape)} dimensions")
    return ArrayHeader(dtype=dtype, shape=shape, fortran=fortran == "True", start=end)


def _read_member(
    source: Source, archive: Archive, name: str, *, are_images: bool = False
) -> npt.NDArray[np.generic]:
    name = f"{name}.npy"
    length = archive.members[name].file_size
    head = archive.read(name, _LONGEST_HEADER)
    header = parse_header(source, name, head, length)
    if are_images:  # before the pixels are decompressed
        source.check_count(header.shape[0] if header.shape else 0)
        check_image_shape(source, header.shape)
    return _values(header, archive.read(name))


def _values(header: ArrayHeader, data: bytes | bytearray) -> npt.NDArray[np.generic]:
    values = np.frombuffer(data, dtype=header.dtype, offset=header.start)
    return values.reshape(header.shape, order="F" if header.fortran else "C")


def _texts(source: Source, names: npt.NDArray[np.generic]) -> list[str]:
    if names.dtype.kind != "U" or names.ndim != 1:
        raise source.error("classes as a list of text", f"dtype {names.dtype}, shape {names.shape}")
    try:
        return [str(name) for name in names.tolist()]
    except (SystemError, ValueError):  # raised for invalid code points
        raise source.error("classes as text", "no text") from None
