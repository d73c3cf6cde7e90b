"""Maps the labels of a data set to the classes of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from robust.datasets import Dataset, DatasetError, check_labels


def match_classes(dataset: Dataset, classes: Sequence[str]) -> Dataset:
    """The data set relabeled with the classes of a model.

    Names are matched in any order; the data may have only some of them. If one side has only
    numbers from 0 as names, labels are not changed, and `changes` says so. Raises DatasetError for
    a name that the model does not have, for more classes than it has, and for names of another
    number than the outputs of a model without class names.
    """
    classes = tuple(classes)
    if dataset.classes == classes:
        return dataset
    index_of = {name: index for index, name in enumerate(classes)}
    unknown = [name for name in dataset.classes if name not in index_of]
    has_numbers = any(name.isdecimal() for name in dataset.classes)
    if unknown and (_numbered(dataset.classes) or (_numbered(classes) and not has_numbers)):
        check_labels(dataset, len(classes))
        if not _numbered(dataset.classes) and len(dataset.classes) != len(classes):
            # The names of some classes don't say which: the dogs of cat/ and dog/ are not class 1.
            raise DatasetError(
                dataset.name,
                expected=f"the names of the model's {len(classes)} outputs (--classes, or classes "
                "in Python), as it has none",
                found=f"{len(dataset.classes)} classes, {_shown(dataset.classes)}",
            )
        pairs = zip(dataset.classes, classes, strict=False)
        notes = "read labels as numbers of the model's classes: " + _shown(
            [f"{name} is {known}" for name, known in pairs]
        )
        if _numbered(dataset.classes) and len(dataset) and int(dataset.labels.min()) == 1:
            notes += "; class 0 has no images (do the labels begin at 1?)"
        return replace(dataset, classes=classes, changes=(*dataset.changes, notes))
    if unknown:
        raise DatasetError(
            dataset.name,
            expected=f"the model's classes {_shown(classes)}",
            found=f"{_shown(dataset.classes)}; the model does not have {_shown(unknown)}",
        )
    index = torch.tensor([index_of[name] for name in dataset.classes])
    return replace(dataset, labels=index[dataset.labels], classes=classes)


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


def _numbered(names: Sequence[str]) -> bool:
    return all(name == str(k) for k, name in enumerate(names))


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
