"""NumPy's .npz, read without pickle and without trusting a declared shape."""

import math
import re

import numpy as np
import numpy.typing as npt

from robust.datasets.archive import Archive
from robust.datasets.arrays import dataset_from_arrays
from robust.datasets.dataset import Dataset
from robust.datasets.errors import DatasetError

_HEADER = re.compile(
    rb"\{\s*'descr':\s*'([<>|=]?)([a-zA-Z])(\d*)',\s*'fortran_order':\s*(True|False),"
    rb"\s*'shape':\s*\(([\d\s,]{0,200})\),?\s*\}\s*"
)


def read_npz(archive: Archive, *, size: int, max_images: int | None = None) -> Dataset:
    """Build a Dataset of the arrays `images`, `labels` and, where there are, `classes` (text).

    Raises DatasetError when one is missing, damaged, an object array or of the wrong form.
    """
    missing = {"images.npy", "labels.npy"} - archive.members.keys()
    if missing:
        found = f"none named {' or '.join(sorted(missing)).replace('.npy', '')}"
        raise DatasetError(archive.source, expected="arrays images and labels", found=found)
    classes = None
    if "classes.npy" in archive.members:
        classes = _texts(archive.source, _read_array(archive, "classes.npy"))
    return dataset_from_arrays(
        archive.source,
        images=_read_array(archive, "images.npy"),
        labels=_read_array(archive, "labels.npy"),
        classes=classes,
        size=size,
        max_images=max_images,
    )


def _texts(source: str, names: npt.NDArray[np.generic]) -> list[str]:
    if names.dtype.kind != "U" or names.ndim != 1:
        found = f"dtype {names.dtype}, shape {names.shape}"
        raise DatasetError(source, expected="classes as a list of text", found=found)
    try:
        return [str(name) for name in names.tolist()]
    except (SystemError, ValueError):  # NumPy's answer to what is no code point
        raise DatasetError(source, expected="classes as text", found="no text") from None


def _read_array(archive: Archive, name: str) -> npt.NDArray[np.generic]:
    data = archive.read(name)

    def bad(found: str) -> DatasetError:
        return DatasetError(archive.source, expected=f"a plain array in {name}", found=found)

    if data[:6] != b"\x93NUMPY" or len(data) < 12:
        raise bad("no array header")
    start, length = (10, 2) if data[6] == 1 else (12, 4)
    end = start + int.from_bytes(data[8 : 8 + length], "little")
    if data[6] not in (1, 2):
        raise bad("a header of another version")
    match = _HEADER.fullmatch(data, start, min(end, len(data)))
    if match is None:
        raise bad("a header of another form (records and objects are refused)")
    order, kind, width, fortran, sides = (group.decode() for group in match.groups())
    if kind not in "biufU":
        raise bad("an object array" if kind == "O" else "an array of another type")
    try:
        dtype = np.dtype(order + kind + width)
        shape = tuple(int(side) for side in sides.split(",") if side.strip())
    except (TypeError, ValueError):
        raise bad("a header that makes no sense") from None
    if (
        len(shape) > 8
        or dtype.itemsize == 0
        or math.prod(shape) * dtype.itemsize != len(data) - end
    ):
        raise bad(f"{len(data) - end} bytes for a shape of {len(shape)} dimensions")
    # A copy, because what is built on read-only memory can't be handed to torch.
    values = np.frombuffer(data, dtype=dtype, offset=end).copy()
    return values.reshape(shape, order="F" if fortran == "True" else "C")
