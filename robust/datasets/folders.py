"""One folder of images per class, on disk or in a zip."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath

import torch

from robust.datasets.archive import Archive
from robust.datasets.dataset import Dataset
from robust.datasets.errors import DatasetError
from robust.images import ImageError, decode_image, fit_image

logger = logging.getLogger(__name__)

MAX_IMAGE_BYTES = 256 << 20

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
_DEEPEST = 8  # folders within folders that are looked into
_EXPECTED = "one folder of images (jpg, png, webp) per class"

Parts = tuple[str, ...]


def read_folder(path: Path, *, size: int) -> Dataset:
    """Build a Dataset of `path/CLASS/IMAGE`; class names in order, by number if all are numbers.

    Hidden files are skipped, files of other kinds too, with a warning. Raises DatasetError for an
    image that does not decode, an image outside a class folder, and a class folder without images.
    """
    files: dict[Parts, Callable[[], bytes]] = {
        file.relative_to(path).parts: file.read_bytes for file in sorted(_files(path))
    }
    source = path.resolve().name
    folders = {folder.name for folder in path.iterdir() if folder.is_dir()}
    empty = {f for f in folders if not f.startswith(".")} - {parts[0] for parts in files}
    if empty:
        raise DatasetError(source, expected=_EXPECTED, found=f"no image in {min(empty)}")
    return _read(source, files, size)


def _files(path: Path) -> Iterator[Path]:
    """Files under `path`, also through links, which may lead round in a circle."""
    for folder, folders, names in os.walk(path, followlinks=True):
        if len(Path(folder).relative_to(path).parts) == _DEEPEST:
            folders.clear()
        yield from (file for name in names if (file := Path(folder, name)).is_file())


def read_folder_zip(archive: Archive, *, size: int) -> Dataset:
    """Build a Dataset of a zip of `CLASS/IMAGE`, itself in one folder or not; as `read_folder`.

    Nothing is extracted: members are decoded in memory, one at a time.
    """
    files: dict[Parts, Callable[[], bytes]] = {}
    for name, info in archive.members.items():
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or name.startswith("/") or "\\" in name:
            raise DatasetError(archive.source, expected="plain relative names", found="another")
        if info.file_size > MAX_IMAGE_BYTES:
            expected = f"members of at most {MAX_IMAGE_BYTES} bytes"
            raise DatasetError(archive.source, expected=expected, found=f"{info.file_size} bytes")
        files[parts] = partial(archive.read, name)
    files = {parts: read for parts, read in sorted(files.items()) if not _hidden(parts)}
    images = [parts for parts in files if _is_image(parts)]
    if len({parts[0] for parts in images}) == 1 and min(map(len, images)) > 2:
        files = {parts[1:] or parts: read for parts, read in files.items()}
    return _read(archive.source, files, size)


def _is_image(parts: Parts) -> bool:
    return PurePosixPath(parts[-1]).suffix.lower() in _SUFFIXES


def _hidden(parts: Parts) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in parts)


def _read(source: str, files: Mapping[Parts, Callable[[], bytes]], size: int) -> Dataset:
    visible = {parts: read for parts, read in files.items() if not _hidden(parts)}
    images = {parts: read for parts, read in visible.items() if _is_image(parts)}
    if not images:
        raise DatasetError(source, expected=_EXPECTED, found="no images")
    if len(images) < len(visible):
        logger.warning(
            "%s: skipped %d files that are no images", source, len(visible - images.keys())
        )
    for parts in images:
        if len(parts) != 2:
            # Deeper folders are refused: data/train/cat would make a class of "train".
            raise DatasetError(source, expected=_EXPECTED, found="/".join(parts)[:200])
    names = {parts[0] for parts in images}
    classes = sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)
    label_of = {name: label for label, name in enumerate(classes)}
    pixels = torch.empty((len(images), 3, size, size), dtype=torch.uint8)
    for index, (parts, read) in enumerate(images.items()):
        try:
            pixels[index] = fit_image(decode_image(read()), size)
        except ImageError as error:
            where = f"{source}/{'/'.join(parts)}"
            raise DatasetError(where, expected=error.expected, found=error.found) from None
    labels = torch.tensor([label_of[parts[0]] for parts in images])
    return Dataset(images=pixels, labels=labels, classes=tuple(classes), name=source)
