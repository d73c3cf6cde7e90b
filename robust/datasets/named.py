"""Data sets with a name: CIFAR-10 through torchvision, handwritten digits through scikit-learn."""

import os
import warnings
from pathlib import Path

import numpy as np

from robust.datasets.arrays import dataset_from_arrays
from robust.datasets.dataset import Dataset
from robust.datasets.errors import DatasetError
from robust.datasets.split import stratified_split

CIFAR10_FOLDER = "cifar-10-batches-py"
DIGITS_HELD_OUT = 297


def read_cifar10(root: Path | None, *, size: int, train: bool) -> Dataset:
    """CIFAR-10: 50,000 training or 10,000 test images of 10 classes (Krizhevsky 2009).

    `root` is the folder above `cifar-10-batches-py`; with None it is downloaded once, to
    `~/.cache/robust` (or under `XDG_CACHE_HOME`). torchvision checks the MD5 of every file before
    it reads one. Raises DatasetError when files are missing or changed, or there is no network.
    """
    from torchvision.datasets import CIFAR10

    folder = _cache() if root is None else root
    try:
        with warnings.catch_warnings():
            # The files were written by a NumPy of 2009, which newer ones complain of.
            warnings.simplefilter("ignore")
            data = CIFAR10(str(folder), train=train, download=root is None)
    except (OSError, RuntimeError) as error:
        found = "none or changed ones" if root else f"no download ({type(error).__name__})"
        raise DatasetError("cifar10", expected=f"its files in {folder}", found=found) from error
    return dataset_from_arrays(
        "cifar10",
        images=np.asarray(data.data),
        labels=np.asarray(data.targets),
        classes=data.classes,
        size=size,
    )


def read_digits(*, size: int, train: bool) -> Dataset:
    """scikit-learn's handwritten digits, enlarged from 8x8 grey: 1,500 to train on, 297 to test.

    The split is stratified and fixed. Raises DatasetError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        expected = "scikit-learn: pip install 'robust[demo]'"
        raise DatasetError("digits", expected=expected, found="no such package") from error
    data = load_digits()
    dataset = dataset_from_arrays(
        "digits", images=data.images / 16, labels=data.target, classes=None, size=size
    )
    kept, held_out = stratified_split(dataset.labels, DIGITS_HELD_OUT, seed=0)
    return dataset.subset(kept if train else held_out)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "robust"
