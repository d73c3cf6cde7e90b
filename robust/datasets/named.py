"""Built-in datasets: CIFAR through torchvision, handwritten digits through scikit-learn."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import torch

from robust.datasets.arrays import dataset_from_arrays
from robust.datasets.dataset import Dataset
from robust.datasets.source import Source
from robust.datasets.split import stratified_split
from robust.images import to_uint8

DIGITS_HELD_OUT = 297


def read_cifar10(source: Source) -> Dataset:
    """CIFAR-10: 50,000 training or 10,000 test images of 10 classes (Krizhevsky 2009).

    Without a path it is downloaded once, to `~/.cache/robust` (or under `XDG_CACHE_HOME`).
    torchvision checks the MD5 of every file before reading. Raises DatasetError if files are
    missing or changed, or there is no network.
    """
    return _read_cifar(source, "CIFAR10", "cifar10")


def read_cifar100(source: Source) -> Dataset:
    """CIFAR-100: as CIFAR-10, of 100 classes, the fine labels (Krizhevsky 2009)."""
    return _read_cifar(source, "CIFAR100", "cifar100")


def _read_cifar(source: Source, kind: str, name: str) -> Dataset:
    from dataclasses import replace

    from torchvision import datasets

    cifar = getattr(datasets, kind)
    source = replace(source, name=name)
    path = source.path
    folder = _cache() if path is None else path.resolve()
    if path is not None and folder.name == cifar.base_folder:
        folder = folder.parent
    try:
        with warnings.catch_warnings():
            # The files were written by a NumPy of 2009, which newer versions warn about.
            warnings.simplefilter("ignore")
            data = cifar(str(folder), train=source.train, download=path is None)
    except (OSError, RuntimeError) as error:
        found = "missing or modified ones" if path else f"no download ({type(error).__name__})"
        raise source.error(f"its files in {folder}", found) from error
    return dataset_from_arrays(
        source,
        images=np.asarray(data.data),
        labels=np.asarray(data.targets),
        classes=data.classes,
    )


def read_digits(source: Source) -> Dataset:
    """scikit-learn's handwritten digits: 1,500 training or 297 test images.

    They are enlarged from 8x8 gray, and their 17 levels are rounded to 8 bits. The split is
    stratified and fixed. Raises DatasetError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise source.error("scikit-learn: pip install 'robust[demo]'", "no such package") from error
    data = load_digits()
    dataset = dataset_from_arrays(
        source, images=to_uint8(torch.from_numpy(data.images / 16)), labels=data.target
    )
    kept, held_out = stratified_split(dataset.labels, DIGITS_HELD_OUT, seed=0)
    return dataset.subset(kept if source.train else held_out)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "robust"
