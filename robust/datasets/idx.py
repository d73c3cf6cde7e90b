"""MNIST's idx files: images and labels of 8 bits, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from robust.datasets.arrays import dataset_from_arrays
from robust.datasets.dataset import Dataset
from robust.datasets.source import Source

_UINT8 = 0x08
_PART_BYTES = 1 << 24
_PARTS = {True: ("train",), False: ("t10k", "test")}


def read_idx(source: Source) -> Dataset:
    """Images of an idx file, with the labels of the matching file in the same folder.

    The labels of `t10k-images-idx3-ubyte` are in `t10k-labels-idx1-ubyte`; either may end in `.gz`.
    Raises DatasetError.
    """
    path = source.path
    if path is None or "images" not in path.name:
        raise source.error("an idx file of images, such as t10k-images-idx3-ubyte", source.name)
    stem = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    candidates = [path.with_name(stem), path.with_name(f"{stem}.gz")]
    labels = next((file for file in candidates if file.is_file()), None)
    if labels is None:
        raise source.error(f"its labels in {stem}, in the same folder", "none")
    return dataset_from_arrays(
        source, images=_read(source, path), labels=_read(source, labels, dimensions=1)
    )


def read_idx_folder(source: Source) -> Dataset:
    """The training or the test split of a folder of MNIST's four files."""
    path = source.path
    assert path is not None
    files = sorted([*path.glob("*images*-ubyte"), *path.glob("*images*-ubyte.gz")])
    found = [file for file in files if file.name.startswith(_PARTS[source.train])]
    if not found:
        expected = f"a file {_PARTS[source.train][0]}-images-idx3-ubyte"
        raise source.error(expected, ", ".join(file.name for file in files) or "no idx files")
    dataset = read_idx(replace(source, path=found[0]))
    others = [file.name for file in files if file.name.startswith(_PARTS[not source.train])]
    if not others:
        return dataset
    note = source.split_note(found[0].name, others[0])
    return replace(dataset, changes=(note, *dataset.changes))


def _read(source: Source, path: Path, dimensions: int = 3) -> npt.NDArray[np.uint8]:
    data = path.read_bytes() if path.suffix != ".gz" else _unzipped(source, path)
    start = 4 + 4 * dimensions
    if data[:4] != bytes((0, 0, _UINT8, dimensions)) or len(data) < start:
        raise source.error(f"an idx file of {dimensions} dimensions, uint8", f"{path.name}")
    shape = struct.unpack(f">{dimensions}I", data[4:start])
    if math.prod(shape) != len(data) - start:
        sides = "x".join(map(str, shape))
        raise source.error(f"{sides} values in {path.name}", f"{len(data) - start}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _unzipped(source: Source, path: Path) -> bytes:
    limit, parts, total = source.limits.max_bytes, [], 0
    try:
        with gzip.open(path) as file:
            while part := file.read(_PART_BYTES):
                parts.append(part)
                total += len(part)
                if total > limit:
                    raise source.error(f"at most {limit} bytes in {path.name}", "more")
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise source.error(f"a complete gzip file {path.name}", "a damaged one") from None
    return b"".join(parts)
