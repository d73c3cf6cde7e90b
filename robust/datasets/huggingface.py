"""Hugging Face datasets on disk: parquet as on the hub, or the folder of `save_to_disk`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
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
_SYNONYMS = {
    "training": "train",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "dev": "validation",
}
_SPLIT = re.compile(rf"(?<![a-z])({'|'.join((*TRAIN, *TEST, *_SYNONYMS))})(?![a-z])", re.IGNORECASE)
_MAX_NAMED = 5  # files named in a note or an error


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
    notes: list[str] = []
    files = [source.path] if source.path.is_file() else _split_files(source, source.path, notes)
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
    if len(files) > 1:
        notes.append(f"concatenated {len(files)} files: {_shown(files)}")
    return fitted.dataset(targets, names, changes=notes)


def _split_files(source: Source, folder: Path, notes: list[str]) -> list[Path]:
    """The files of the requested split, in order; all files if they name no split.

    Adds a note on skipped files. Raises DatasetError if only some of the files name a split.
    """
    found = [path for pattern in _FILES for path in sorted(folder.glob(pattern))]
    files = [path for path in found if not path.name.startswith("cache-")]
    if len(files) < len(found):
        # What `map` and `filter` of the datasets library computed: the same images again.
        notes.append(f"skipped {len(found) - len(files)} cache-*.arrow of the datasets library")
    if not files:
        others = [path for path in sorted(folder.iterdir()) if path.is_file()]
        raise source.error("parquet or arrow files", _shown(others))
    split_of = {path: _split_in_name(source, path.relative_to(folder)) for path in files}
    splits = {split for split in split_of.values() if split}
    if not splits:
        return files
    without = [path for path in files if not split_of[path]]
    if without:
        expected = "a split, such as train or test, in the name of every file or of none"
        raise source.error(expected, f"none in {_shown(without)}")
    for split in TRAIN if source.train else TEST:
        chosen = [path for path in files if split_of[path] == split]
        if chosen:
            unread = sorted(splits & set(TEST if source.train else TRAIN))
            if unread:
                notes.append(source.split_note(f"its split {split}", ", ".join(unread)))
            return chosen
    wanted = " or ".join(TRAIN if source.train else TEST)
    raise source.error(f"a split {wanted}", ", ".join(sorted(splits)))


def _split_in_name(source: Source, path: Path) -> str:
    """The split in the name of a file, or else of its folder; an empty string if there is none.

    It is `test` for `test-00000-of-00001.parquet`, `mnist_test.parquet` and
    `test/data-00000-of-00001.arrow`. Raises DatasetError for a name with two splits.
    """
    for text in (path.stem, *reversed(path.parent.parts)):
        words: set[str] = {word.lower() for word in _SPLIT.findall(text)}
        splits = {_SYNONYMS.get(word, word) for word in words}
        if len(splits) > 1:
            raise source.error("one split in the name of a file", text[:100])
        if splits:
            return splits.pop()
    return ""


def _shown(files: Sequence[Path]) -> str:
    names = ", ".join(path.name[:80] for path in files[:_MAX_NAMED])
    return (names + (", ..." if len(files) > _MAX_NAMED else "")) or "none"


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
