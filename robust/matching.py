"""Maps the labels of a dataset to the classes of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from robust.datasets import Dataset, DatasetError, check_labels


def match_classes(dataset: Dataset, classes: Sequence[str]) -> Dataset:
    """The dataset relabeled with the classes of a model.

    Names are matched in any order; the data may have only some of them. `007` is the class `7`, and
    if one side has only numbers from 0 as names, labels are not changed; `changes` says both.
    Raises DatasetError for a name that the model does not have, for more classes than it has, and
    for names of another number than the outputs of a model without class names.
    """
    classes = tuple(classes)
    if dataset.classes == classes:
        return dataset
    names, known = _plain_numbers(dataset.classes), _plain_numbers(classes)
    index_of = {name: index for index, name in enumerate(known)}
    unknown = [
        given for given, name in zip(dataset.classes, names, strict=True) if name not in index_of
    ]
    has_numbers = any(name.isdecimal() for name in names)
    if unknown and (_numbered(names) or (_numbered(known) and not has_numbers)):
        check_labels(dataset, len(classes))
        if not _numbered(names) and len(names) != len(classes):
            # The names of some classes don't say which: the dogs of cat/ and dog/ are not class 1.
            raise DatasetError(
                dataset.name,
                expected=f"the names of the model's {len(classes)} outputs (--classes, or classes "
                "in Python), as it has none",
                found=f"{len(names)} classes, {_shown(dataset.classes)}",
            )
        note = _note("read labels as numbers of the model's classes", dataset.classes, classes)
        if _numbered(names) and len(dataset) and int(dataset.labels.min()) == 1:
            note += "; class 0 has no images (do the labels begin at 1?)"
        return replace(dataset, classes=classes, changes=(*dataset.changes, note))
    if unknown:
        raise DatasetError(
            dataset.name,
            expected=f"the model's classes {_shown(classes)}",
            found=f"{_shown(dataset.classes)}; the model does not have {_shown(unknown)}",
        )
    index = [index_of[name] for name in names]
    found = [classes[k] for k in index]
    changes = dataset.changes
    if any(given != name for given, name in zip(dataset.classes, found, strict=True)):
        changes = (*changes, _note("matched class names as numbers", dataset.classes, found))
    labels = torch.tensor(index)[dataset.labels]
    return replace(dataset, labels=labels, classes=classes, changes=changes)


def first_images(dataset: Dataset, count: int) -> Dataset:
    """The images at `first_indices`."""
    return dataset.subset(first_indices(dataset, count))


def first_indices(dataset: Dataset, count: int) -> Tensor:
    """Indices of the first `count` images, or of evenly spaced ones if the data is sorted by class.

    The first images of sorted data, such as class folders, would all be of one class. Returns
    int64 (count,), or fewer if there are fewer images.
    """
    n = len(dataset)
    if count < n and bool((dataset.labels.diff() >= 0).all()):
        return torch.arange(count) * n // count
    return torch.arange(min(count, n))


def _plain_numbers(names: Sequence[str]) -> Sequence[str]:
    """The names with numbers spelled alike, such as `7` for `00007`, unless that merges two."""
    plain = [name.lstrip("0") or "0" if name.isdecimal() else name for name in names]
    return plain if len(set(plain)) == len(set(names)) else names


def _numbered(names: Sequence[str]) -> bool:
    return all(name == str(k) for k, name in enumerate(names))


def _note(what: str, given: Sequence[str], known: Sequence[str]) -> str:
    pairs = zip(given, known, strict=False)
    return f"{what}: {_shown([f'{name} is {other}' for name, other in pairs])}"


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
