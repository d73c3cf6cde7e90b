"""Finds the right folder if the images are deeper than the one given by ``--data``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from robust.datasets import DatasetError
from robust.datasets.folders import IMAGE_SUFFIXES

_TRAIN = ("train", "training")
_VALIDATION = ("val", "valid", "validation", "dev")
_TEST = ("test", "testing")
_MAX_DEPTH = 3  # levels of folders that are searched


def check_layout(path: Path) -> None:
    """Raise DatasetError if `path` contains splits, or a folder that contains the classes.

    The message says which folder to give to which option. `load_dataset` handles everything else.
    """
    if not path.is_dir() or (path / "cifar-10-batches-py").is_dir():
        return
    splits = {folder.name.lower(): folder for folder in _folders(path) if _has_classes(folder)}
    train = _first(splits, _TRAIN)
    if train is not None:
        found = ", ".join(f"{folder.name}/" for folder in sorted(splits.values()))
        validation, test = _first(splits, _VALIDATION), _first(splits, _TEST)
        use = f"use --data {train}"
        if validation is not None:
            use += f" --val {validation}"
        if test is not None:
            use += f", and keep {test} for robust evaluate --data"
        raise DatasetError(
            str(path), expected="one folder of images per class", found=f"{found}; {use}"
        )
    inner = _class_folder(path)
    if inner is not None and inner != path:
        example = next(image for folder in _folders(inner) for image in _images(folder))
        found = f"{example.relative_to(path)}; use --data {inner}"
        raise DatasetError(str(path), expected="one folder of images per class", found=found)


def _class_folder(path: Path) -> Path | None:
    """`path` or the only folder below it that holds one folder of images per class."""
    for _ in range(_MAX_DEPTH):
        if _has_classes(path):
            return path
        inner = [folder for folder in _folders(path) if any(_folders(folder))]
        if len(inner) != 1 or any(_images(path)):
            return None
        path = inner[0]
    return None


def _has_classes(path: Path) -> bool:
    """Whether two folders or more directly hold images."""
    return sum(any(_images(folder)) for folder in _folders(path)) >= 2


def _folders(path: Path) -> Iterator[Path]:
    return (item for item in sorted(path.iterdir()) if item.is_dir() and item.name[0] != ".")


def _images(path: Path) -> Iterator[Path]:
    return (item for item in path.iterdir() if item.suffix.lower() in IMAGE_SUFFIXES)


def _first(folders: dict[str, Path], names: tuple[str, ...]) -> Path | None:
    return next((folders[name] for name in names if name in folders), None)
