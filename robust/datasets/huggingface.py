"""Hugging Face data sets on disk: parquet as on the hub, or the folder of `save_to_disk`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from robust.datasets.dataset import Dataset
from robust.datasets.errors import DatasetError
from robust.datasets.fields import image_and_label_names
from robust.datasets.image_list import ImageList
from robust.datasets.labels import class_names, read_labels
from robust.datasets.source import TEST, TRAIN, Source
from robust.image_headers import ImageError

_FILES = ("*.parquet", "*.arrow", "*/*.parquet", "*/*.arrow")


def read_huggingface(source: Source) -> Dataset:
    """Images and labels of a parquet file, or of the requested split of a folder.

    Columns are named as in `fields.py`; an image is the bytes of its file, or a struct with them.
    Class names come from the features that `datasets` stores in the schema. Raises DatasetError,
    also if PyArrow is not installed.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise source.error("PyArrow: pip install 'robust[data]'", "no such package") from error
    assert source.path is not None
    files = [source.path] if source.path.is_file() else _split_files(source, source.path)
    try:
        tables = [_table(path) for path in files]
        images_name, labels_name = image_and_label_names(source, tables[0].column_names)
        assert labels_name is not None
        table = pa.concat_tables([t.select([images_name, labels_name]) for t in tables])
    except (pa.ArrowException, KeyError) as error:  # KeyError: a file without these columns
        found = f"{type(error).__name__} in {files[0].name}"
        raise source.error("complete parquet or arrow files of one schema", found) from None
    source.check_count(table.num_rows)
    labels = np.asarray(table.column(labels_name).to_pylist())
    if labels.dtype.kind not in "biuf":
        raise source.error("numbers as labels", f"{labels_name} of {labels.dtype}")
    targets = read_labels(source, labels, count=table.num_rows)
    names = class_names(source, targets, _features(tables[0].schema, labels_name))
    fitted = ImageList(source, table.num_rows)
    for index, data in enumerate(_image_bytes(source, table.column(images_name))):
        try:
            fitted.add_bytes(data)
        except ImageError as error:
            where = f"{source.name}, row {index}"
            raise DatasetError(where, expected=error.expected, found=error.found) from None
    notes = [] if len(files) == 1 else [f"concatenated {len(files)} files"]
    return fitted.dataset(targets, names, changes=notes)


def _split_files(source: Source, folder: Path) -> list[Path]:
    """The files of the requested split, in order; all files if they name no split."""
    files = [path for pattern in _FILES for path in sorted(folder.glob(pattern))]
    split_of = {path: _split_in_name(path.relative_to(folder)) for path in files}
    splits = {split for split in split_of.values() if split}
    if not splits:
        return files
    for split in TRAIN if source.train else TEST:
        found = [path for path in files if split_of[path] == split]
        if found:
            return found
    wanted = " or ".join(TRAIN if source.train else TEST)
    raise source.error(f"a split {wanted}", ", ".join(sorted(splits)))


def _split_in_name(path: Path) -> str:
    """`test` for `test-00000-of-00001.parquet` and `test/data-00000-of-00001.arrow`; else empty."""
    for text in (path.name, *reversed(path.parent.parts)):
        match = re.match(r"(train|test|validation|valid|val)\b", text)
        if match:
            return match[1]
    return ""


def _table(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        return pq.read_table(path)
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).read_all()


def _features(schema: Any, labels_name: str) -> list[str] | None:
    """The class names in the metadata that `datasets` writes; None if there are none."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        names = about["info"]["features"][labels_name]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def _image_bytes(source: Source, column: Any) -> Iterator[bytes]:
    for row, value in enumerate(column):
        cell = value.as_py()
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(data, bytes):
            found = "a path" if isinstance(cell, dict) and cell.get("path") else type(cell).__name__
            raise source.error("the bytes of an image in every row", f"{found} in row {row}")
        yield data
