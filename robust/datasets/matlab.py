"""SVHN's MATLAB files: `X` of images (32, 32, 3, N) and `y` of labels from 1 to 10."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from robust.datasets.arrays import dataset_from_arrays
from robust.datasets.dataset import Dataset
from robust.datasets.fields import (
    class_name_field,
    image_and_label_names,
    split_notes,
    unused_classes,
)
from robust.datasets.source import Source

_SVHN_ZERO = 10  # label of the digit 0


def read_mat(source: Source) -> Dataset:
    """Images, labels and class names of a .mat file.

    Images are `(H, W, 3, N)`, gray `(H, W, N)`, one image `(H, W, 3)` or `(H, W)`, or in an order
    of `dataset_from_arrays`; the number of labels tells which. Labels that begin at 1 and end at 10
    are SVHN's, where 10 means 0; with class names they are counted from 1 if they end at the last.
    Raises DatasetError, also if SciPy is not installed.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise source.error("SciPy: pip install 'robust[data]'", "no such package") from error
    assert source.path is not None
    try:
        arrays = {name: value for name, value in loadmat(source.path).items() if name[:2] != "__"}
    except OSError:
        raise
    except Exception:  # the reader raises many kinds on broken files
        raise source.error(
            "a MATLAB file of version 5 to 7.2", "another or a damaged one"
        ) from None
    images_name, labels_name = image_and_label_names(source, arrays)
    assert labels_name is not None
    labels = np.asarray(arrays[labels_name])
    labels = labels.reshape(-1) if labels.size == max(labels.shape, default=0) else labels
    count = len(labels) if labels.ndim else 1
    images = _images_first(source, np.asarray(arrays[images_name]), count)
    notes = split_notes(source, arrays, images_name)
    name = class_name_field(arrays)
    classes = None if name is None else _texts(arrays[name])
    if name is not None and classes is None:
        notes.append(unused_classes(name))
    if labels.dtype.kind in "uif" and labels.size:  # MATLAB's numbers are floats by default
        labels = _from_zero(labels, classes, notes)
    return dataset_from_arrays(source, images=images, labels=labels, classes=classes, changes=notes)


def _images_first(source: Source, images: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    """`count` images in MATLAB's order, `(H, W, 3, N)` or `(H, W, N)`, as (N, ...); others as is.

    MATLAB drops the last axis of a single image. Raises DatasetError for gray images that may be in
    either order.
    """
    shape, channels = images.shape, (1, 3)
    if count == 1 and 1 not in shape and (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)):
        return images[None]
    if len(shape) == 4 and shape[3] == count:
        # (32, 3, 32, 32) and (3, 32, 32, 3) are not MATLAB's, (32, 32, 3, 32) is.
        other = shape[0] == count and (
            shape[2] not in channels or shape[1] in channels or shape[3] in channels
        )
        return images if other else images.transpose(3, 0, 1, 2)
    if len(shape) == 3 and shape[2] == count:
        if shape[0] == count:
            expected = "gray images (H, W, N) with another height than their number"
            raise source.error(expected, f"shape {shape}")
        return images.transpose(2, 0, 1)
    return images


def _from_zero(
    labels: npt.NDArray[Any], classes: Sequence[str] | None, notes: list[str]
) -> npt.NDArray[Any]:
    """Labels that begin at 1 as labels that begin at 0, with a note."""
    low, high = labels.min(), labels.max()
    if classes is None and low >= 1 and high == _SVHN_ZERO:
        count = int((labels == _SVHN_ZERO).sum())
        notes.append(f"read {count} labels 10 as 0, as in SVHN")
        return np.where(labels == _SVHN_ZERO, 0, labels)
    if classes is not None and low >= 1 and high == len(classes):
        notes.append(f"read labels 1 to {high:g} as 0 to {high - 1:g}")
        return labels - 1
    return labels


def _texts(values: npt.NDArray[Any]) -> list[str] | None:
    """The text in a cell array or the rows of a char array; None for anything else."""
    cells = [np.asarray(cell) for cell in np.asarray(values).reshape(-1)]
    if any(cell.dtype.kind != "U" or cell.size != 1 for cell in cells):
        return None
    return [str(cell.item()).rstrip() for cell in cells]
