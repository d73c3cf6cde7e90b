"""SVHN's MATLAB files: `X` of images (32, 32, 3, N) and `y` of labels from 1 to 10."""

from __future__ import annotations

import numpy as np

from robust.datasets.arrays import dataset_from_arrays
from robust.datasets.dataset import Dataset
from robust.datasets.fields import image_and_label_names
from robust.datasets.source import Source

_SVHN_ZERO = 10  # label of the digit 0


def read_mat(source: Source) -> Dataset:
    """Images and labels of a .mat file; if labels are 1 to 10, 10 means 0, as in SVHN.

    The layout `(H, W, 3, N)` is recognized by the number of labels. Raises DatasetError, also if
    SciPy is not installed.
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
    images, labels = arrays[images_name], np.asarray(arrays[labels_name])
    labels = labels.reshape(-1) if labels.size == max(labels.shape, default=0) else labels
    if images.ndim == 4 and images.shape[-1] == len(labels) != images.shape[0]:
        images = images.transpose(3, 0, 1, 2)
    notes = []
    if (
        labels.dtype.kind in "uif"  # MATLAB's numbers are floats by default
        and labels.size
        and (labels.min(), labels.max()) == (1, _SVHN_ZERO)
    ):
        count = int((labels == _SVHN_ZERO).sum())
        labels = np.where(labels == _SVHN_ZERO, 0, labels)
        notes.append(f"read {count} labels 10 as 0, as in SVHN")
    return dataset_from_arrays(source, images=images, labels=labels, changes=notes)
