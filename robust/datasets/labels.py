"""Converts labels of any format to int64, and checks class names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from robust.choices import MAX_CLASSES
from robust.datasets.source import Source

Array = Tensor | npt.NDArray[np.generic]


def numeric_tensor(source: Source, what: str, values: Array) -> Tensor:
    """A numeric array as a tensor, without a copy if possible; raises DatasetError."""
    if values.ndim == 0:
        raise source.error(f"a list of {what}", "a single number")
    if isinstance(values, Tensor):
        return values.detach()
    if values.dtype.kind == "O":
        raise source.error(f"numeric {what}", "an object array")
    if values.dtype.kind not in "biuf" or values.dtype.itemsize > 8:
        raise source.error(f"numeric {what}", f"dtype {values.dtype}")
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(native if native.flags.writeable else native.copy())


def read_labels(source: Source, values: Array, *, count: int) -> Tensor:
    """The labels of `count` images, int64 (count,).

    Accepts integers of any type and booleans, `(N,)` or `(N, 1)`, and one-hot rows `(N, K)`.
    Raises DatasetError for fractions, soft labels, a wrong count, and more than MAX_CLASSES
    classes.
    """
    if values.ndim == 0 and count == 1:
        values = values.reshape(1)
    labels = numeric_tensor(source, "labels", values)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    elif labels.ndim == 2 and labels.shape[0] == count and labels.shape[1] > 1:
        labels = _from_one_hot(source, labels)
    if labels.shape != (count,):
        expected, found = f"{count} labels, one for each image", f"shape {tuple(labels.shape)}"
        raise source.error(expected, found)
    if labels.is_complex():
        raise source.error("whole-number labels", str(labels.dtype))
    if not labels.is_floating_point():
        labels = labels.to(torch.int64)  # torch has no min and max for the wider unsigned types
    elif not bool(labels.isfinite().all()) or not torch.equal(labels, labels.round()):
        raise source.error("whole-number labels", "fractions, NaN or infinity")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= MAX_CLASSES:
        expected = f"labels from 0 to at most {MAX_CLASSES - 1}"
        raise source.error(expected, f"labels from {low} to {high}")
    return labels.to(torch.int64)


def class_names(source: Source, labels: Tensor, classes: Sequence[str] | None) -> tuple[str, ...]:
    """The class names, checked against the labels; `0`, `1`, ... if `classes` is None.

    Raises DatasetError for a label without a name, and for two classes of the same name.
    """
    needed = int(labels.max()) + 1
    if classes is None:
        return tuple(str(label) for label in range(needed))
    if needed > len(classes):
        found = f"{len(classes)} class names and a label {needed - 1}"
        raise source.error("a class name for each label", found)
    repeated = next((name for name, count in Counter(classes).items() if count > 1), None)
    if repeated is not None:
        raise source.error("a different name for each class", f"{repeated[:80]} twice or more")
    return tuple(classes)


def _from_one_hot(source: Source, rows: Tensor) -> Tensor:
    """The index of the single one in each row (N, K) of zeros. Raises DatasetError."""
    hot = rows != 0
    if rows.shape[1] > MAX_CLASSES or not bool(((rows == 1) == hot).all()):
        raise source.error("labels (N,), or one-hot rows", f"other values {tuple(rows.shape)}")
    if not bool((hot.sum(1) == 1).all()):
        found = "rows without a single 1"
        raise source.error("one-hot labels, a single 1 in each row", found)
    return hot.to(torch.uint8).argmax(1)
