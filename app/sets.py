"""Labelled sets for evaluation: uploaded, or registered by the operator."""

from __future__ import annotations

import re
from pathlib import Path

from app.errors import FieldError, InvalidParameters
from app.model import ServedModel
from app.parameters import describe
from app.settings import Settings
from robust.datasets import Dataset, load_dataset, load_upload
from robust.matching import first_images, match_classes


def registered(settings: Settings) -> dict[str, Path]:
    """The sets in the operator's folder by name, that of a file without its ending."""
    folder = settings.datasets
    if folder is None or not folder.is_dir():
        return {}
    return {
        path.name if path.is_dir() else path.stem: path.absolute()
        for path in sorted(folder.iterdir())
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", path.name)
    }


def load_set(
    files: list[bytes],
    name: str | None,
    *,
    limit: int | None,
    model: ServedModel,
    settings: Settings,
) -> Dataset:
    """The set that a request names or carries, at the model's size, cut to `limit` images.

    A name is looked up, never used as a path. Raises InvalidParameters or DatasetError.
    """
    if bool(files) == (name is not None):
        expected = 'either a set in the field "file" or the name of one in "dataset"'
        raise _fault("file", expected, "both" if files else "neither")
    if name is None:
        dataset = load_upload(
            files[0], None, size=model.input_size, max_images=settings.max_upload_images
        )
    else:
        known = registered(settings)
        if name not in known:
            names = ", ".join(known) or "none is registered"
            raise _fault("dataset", f"the name of a registered set ({names})", describe(name))
        dataset = load_dataset(known[name], size=model.input_size, train=False)
    dataset = match_classes(dataset, model.classes)
    return dataset if limit is None else first_images(dataset, limit)


def _fault(field: str, expected: str, got: str) -> InvalidParameters:
    return InvalidParameters([FieldError(field=field, expected=expected, got=got)])
