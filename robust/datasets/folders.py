"""One folder of images per class, on disk or in a zip."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from pathlib import Path, PurePosixPath

import torch

from robust.datasets.archive import Archive
from robust.datasets.dataset import Dataset
from robust.datasets.errors import DatasetError
from robust.datasets.image_list import ImageList
from robust.datasets.source import TEST, TRAIN, Source
from robust.image_decoding import is_image
from robust.image_headers import ImageError

MAX_IMAGE_BYTES = 256 << 20

# A file with one of these extensions must be a readable image.
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm "
    ".heic .heif .avif .jp2 .j2k .jxl .jxr".split()
)
_MAX_DEPTH = 8  # levels of subfolders that are searched
_EXPECTED = "one folder of images per class"
_MAX_NAMED = 5  # files named in a note or an error
_SPLITS = frozenset({*TRAIN, *TEST})

Parts = tuple[str, ...]
Read = Callable[[int | None], bytes]
"""Reads a file, or its first bytes."""


def read_folder(source: Source) -> Dataset:
    """Build a Dataset of `path/CLASS/IMAGE` or `path/SPLIT/CLASS/IMAGE`.

    Class names are sorted, numerically if all are numbers. Images are recognized by content or by
    extension; other files, hidden ones and broken links are skipped and noted. Raises DatasetError
    for an image that does not decode, an image outside a class folder, and a class folder without
    images.
    """
    path = source.path
    assert path is not None
    files, broken_links = _files(path)
    images, changes = _images(
        {file.relative_to(path).parts: partial(_read_file, file) for file in files}
    )
    images, split = _of_split(source, images, changes)
    _check_classes(source, {f.name for f in (path / split).iterdir() if f.is_dir()}, images)
    if broken_links:
        changes.append(_skipped(broken_links, "broken link", "broken links"))
    return _read(source, images, changes)


def _of_split(
    source: Source, images: dict[Parts, Read], changes: list[str]
) -> tuple[dict[Parts, Read], str]:
    """The images of the split to read and its folder, such as `test` of `test/CLASS/IMAGE`.

    All images and an empty string if there are no such folders. Adds a note. Raises DatasetError
    if the requested split does not exist.
    """
    found = {parts[0] for parts in images if len(parts) == 3}
    if not found or not found <= _SPLITS or any(len(parts) != 3 for parts in images):
        return images, ""
    wanted = TRAIN if source.train else TEST
    split = next((name for name in wanted if name in found), "")
    if not split:
        raise source.error(f"a folder {' or '.join(wanted)}", ", ".join(sorted(found)))
    changes.append(f"read its folder {split}")
    return {parts[1:]: read for parts, read in images.items() if parts[0] == split}, split


def _files(path: Path) -> tuple[list[Path], list[str]]:
    """The files under `path`, following links, and the broken links.

    Limits the depth, as links may form a cycle.
    """
    files, broken_links = [], []
    for folder, folders, names in os.walk(path, followlinks=True):
        if len(Path(folder).relative_to(path).parts) == _MAX_DEPTH:
            folders.clear()
        for name in names:
            file = Path(folder, name)
            if file.is_file():
                files.append(file)
            elif file.is_symlink() and not file.exists():
                broken_links.append(str(file.relative_to(path)))
    return sorted(files), sorted(broken_links)


def _read_file(path: Path, limit: int | None) -> bytes:
    with path.open("rb") as file:
        return file.read(-1 if limit is None else limit)


def read_folder_zip(source: Source) -> Dataset:
    """Build a Dataset of a zip of `CLASS/IMAGE`, with or without a top folder, like `read_folder`.

    Nothing is extracted to disk: members are decoded in memory, one at a time.
    """
    with source.archive() as archive:
        files: dict[Parts, Read] = {}
        for name, info in archive.members.items():
            parts = PurePosixPath(name).parts
            if not parts or ".." in parts or name.startswith("/") or "\\" in name:
                raise source.error("relative member names", repr(name[:100]))
            if info.file_size > MAX_IMAGE_BYTES:
                expected = f"members of at most {MAX_IMAGE_BYTES} bytes"
                raise source.error(expected, f"{info.file_size} bytes")
            files[parts] = partial(_read_member, archive, name)
        images, changes = _images(dict(sorted(files.items())))
        top = {parts[0] for parts in images}
        prefix: Parts = ()
        if len(top) == 1 and not top <= _SPLITS and min(map(len, images)) > 2:
            prefix = tuple(top)
            images = {parts[1:]: read for parts, read in images.items()}
        images, split = _of_split(source, images, changes)
        prefix += (split,) if split else ()
        folders = {parts[:-1] for parts in files}
        folders |= {PurePosixPath(name.strip("/")).parts for name in archive.folders}
        at = len(prefix)
        _check_classes(source, {f[at] for f in folders if f[:at] == prefix and f[at:]}, images)
        return _read(source, images, changes)


def _check_classes(source: Source, folders: AbstractSet[str], images: Mapping[Parts, Read]) -> None:
    """Raise DatasetError if one of the class folders has no images."""
    empty = {name for name in folders if not _hidden((name,))} - {parts[0] for parts in images}
    if images and empty:
        raise source.error(_EXPECTED, f"no image in {min(empty)[:100]}")


def _read_member(archive: Archive, name: str, limit: int | None) -> bytes:
    return bytes(archive.read(name, limit))


def _hidden(parts: Parts) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in parts)


def _skipped(names: Sequence[str], one: str, many: str) -> str:
    """`skipped 2 hidden files: a, b`, with the first few names."""
    shown = ", ".join(names[:_MAX_NAMED]) + (", ..." if len(names) > _MAX_NAMED else "")
    return f"skipped {len(names)} {one if len(names) == 1 else many}: {shown}"[:500]


def _images(files: Mapping[Parts, Read]) -> tuple[dict[Parts, Read], list[str]]:
    """The files that are images by content or extension, and a note on the others."""
    images: dict[Parts, Read] = {}
    hidden, others = [], []
    for parts, read in files.items():
        name = "/".join(parts)
        if _hidden(parts):
            hidden.append(name)
        elif PurePosixPath(parts[-1]).suffix.lower() in IMAGE_SUFFIXES or is_image(read(32)):
            images[parts] = read
        else:
            others.append(name)
    changes = []
    if hidden:
        changes.append(_skipped(hidden, "hidden file", "hidden files"))
    if others:
        changes.append(_skipped(others, "file that is not an image", "files that are not images"))
    return images, changes


def _read(source: Source, images: Mapping[Parts, Read], changes: list[str]) -> Dataset:
    if not images:
        raise source.error(_EXPECTED, "no images")
    for parts in images:
        if len(parts) != 2:
            # Deeper folders are refused: data/train/cat would make a class of "train".
            raise source.error(f"{_EXPECTED}, CLASS/IMAGE", "/".join(parts)[:200])
    classes = _sorted_classes({parts[0] for parts in images}, changes)
    label_of = {name: label for label, name in enumerate(classes)}
    fitted = ImageList(source, len(images))
    broken: dict[str, ImageError] = {}
    for parts, read in images.items():
        try:
            fitted.add_bytes(read(None))
        except ImageError as error:
            broken["/".join(parts)] = error
            if len(broken) == _MAX_NAMED:
                break
    if broken:
        raise _broken(source, broken)
    labels = torch.tensor([label_of[parts[0]] for parts in images])
    return fitted.dataset(labels, classes, changes=changes)


def _sorted_classes(names: Iterable[str], notes: list[str]) -> list[str]:
    """The names in the order of their labels: as numbers if all are, else as text.

    Adds a note if torchvision's ImageFolder, which sorts as text, gives them other labels.
    """
    as_text = sorted(names)
    if not all(name.isdecimal() for name in as_text):
        return as_text
    classes = sorted(as_text, key=int)
    different = [label for label, name in enumerate(classes) if name != as_text[label]]
    if different:
        label = different[0]
        notes.append(
            f"sorted the classes as numbers: label {label} is {classes[label]}; torchvision's "
            f"ImageFolder sorts them as text, where it is {as_text[label]}"
        )
    return classes


def _broken(source: Source, images: Mapping[str, ImageError]) -> DatasetError:
    """The error for the first images that can't be read, at most `_MAX_NAMED`."""
    if len(images) == 1:
        ((name, error),) = images.items()
        where = f"{source.name}/{name}"
        return DatasetError(where, expected=error.expected, found=error.found)
    found = "; ".join(f"{name} with {error.found}" for name, error in images.items())
    more = "; ..." if len(images) == _MAX_NAMED else ""
    return source.error("readable images", found + more)
