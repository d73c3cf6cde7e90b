"""One function that loads every data format, and one for uploads."""

from __future__ import annotations

import re
from pathlib import Path

from robust.datasets.dataset import Dataset
from robust.datasets.errors import DatasetError
from robust.datasets.npz import read_npz
from robust.datasets.pickle_file import is_pickle, read_pickle_file
from robust.datasets.registry import by_name, by_suffix, form_of_file, form_of_folder
from robust.datasets.source import Limits, Source
from robust.image_headers import MAX_PIXELS


def load_dataset(source: str | Path, *, size: int = 32, train: bool = True) -> Dataset:
    """Load labeled images as `(N, 3, size, size)`, uint8 or float32 as in the source.

    `source` is a name, a file or a folder in one of the formats in `registry.py`; write `./digits`
    for a folder with the name of a built-in set. `train` chooses the split of a set that has two:
    by default the training split; ``train=False`` reads the test split, as ``robust evaluate`` does
    by default. Pickles are never executed. `Dataset.changes` lists everything resized, skipped or
    guessed. Raises DatasetError, which names the source, what was expected and what was found, and
    ValueError for another `size` or `train`.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"expected size as a whole number of at least 1, got {size!r}")
    if not isinstance(train, bool):
        raise ValueError(f"expected train as True or False, got {train!r}")
    named = by_name().get(str(source)) if isinstance(source, str) else None
    if named is not None:
        return named.load()(Source(name=str(source), size=size, train=train))
    path = Path(source)
    try:
        return _read_path(path, size=size, train=train)
    except OSError as error:
        where = str(error.filename or path)
        found = (error.strerror or type(error).__name__).lower()
        raise DatasetError(where, expected="a readable file", found=found) from error


def load_upload(
    data: bytes,
    filename_hint: str | None,
    *,
    size: int,
    max_images: int,
    max_bytes: int = 256 << 20,
    max_pixels: int = MAX_PIXELS,
    max_fitted: int | None = None,
) -> Dataset:
    """Load labeled images from the bytes of an `.npz`, `torch.save` or `pickle.dump` file.

    The format is recognized by content; the hint only names the Dataset. Limits, each checked
    before anything is allocated: `max_images` images; `max_bytes` declared decompressed bytes and
    bytes of the resulting images; `max_pixels` width times height; `max_fitted` images to resize
    (TooManyToFit). Raises DatasetError.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(filename_hint or "").name)[:64] or "upload"
    source = Source(
        name=name,
        data=data,
        size=size,
        limits=Limits(
            max_images=max_images,
            max_fitted=max_fitted,
            max_bytes=max_bytes,
            max_pixels=max_pixels,
            # A list of tensors has a member per image, one per label, and a few more.
            max_members=10_000 + 4 * max_images,
            # A PIL image takes some 30 operations, or 100 with rich metadata.
            max_steps=10_000 + 200 * max_images,
        ),
    )
    if is_pickle(data[:32]):
        return read_pickle_file(source)
    if data.startswith(b"PK\x03\x04"):
        with source.archive() as archive:
            is_npz = any("/" not in name and name.endswith(".npy") for name in archive.members)
        return read_npz(source) if is_npz else read_pickle_file(source)
    expected = "an npz with images and labels, or a file of torch.save or pickle.dump"
    raise source.error(expected, f"{len(data)} bytes of another kind")


def _read_path(path: Path, *, size: int, train: bool) -> Dataset:
    if not path.exists():
        expected = f"a file, a folder, {' or '.join(map(repr, by_name()))}"
        raise DatasetError(str(path), expected=expected, found="no such file")
    name = path.resolve().name if path.is_dir() else path.name
    source = Source(name=name, path=path, size=size, train=train)
    if path.is_dir():
        return form_of_folder(path).load()(source)
    form = form_of_file(path.name)
    if form is None:
        if is_pickle(source.head(32)):
            return read_pickle_file(source)
        expected = f"a name that ends in {', '.join(by_suffix())}"
        raise source.error(expected, path.suffix or path.name)
    return form.load()(source)
