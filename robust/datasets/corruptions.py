"""CIFAR-10-C and -P: a folder of .npy files of images, and their labels in labels.npy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from robust.datasets.arrays import check_image_shape, dataset_from_arrays
from robust.datasets.dataset import Dataset
from robust.datasets.npz import LABELS_FILE, labels_file, read_npy_file
from robust.datasets.source import Source

_VIDEO_DIMENSIONS = 5  # of sequences of frames: (N, frames, H, W, 3)


def read_npy(source: Source) -> Dataset:
    """Images in a .npy with labels.npy in the same folder, such as `CIFAR-10-C/fog.npy`.

    There may be one label per image, one per image that repeats at several severities
    (CIFAR-10-C), or one per sequence of frames (CIFAR-10-P). Raises DatasetError.
    """
    path, labels = source.path, labels_file(source)
    if path is None or labels is None:
        expected = f"{LABELS_FILE} in the same folder, or an .npz of both"
        raise source.error(expected, "a .npy alone")
    return _dataset(source, path, labels)


def read_corruptions(source: Source) -> Dataset:
    """All images of a folder of .npy files with labels.npy, in the order of file names."""
    path = source.path
    assert path is not None
    labels = path / LABELS_FILE
    files = [file for file in sorted(path.glob("*.npy")) if file.name != LABELS_FILE]
    if not files:
        raise source.error(f".npy files of images in the folder of {LABELS_FILE}", "none")
    parts = [_dataset(source, file, labels) for file in files]
    for file, part in zip(files, parts, strict=True):
        if part.dtype != parts[0].dtype:
            raise source.error(f"images of {parts[0].dtype}, as in {files[0].name}", file.name)
    changes = [f"{f.name}: {line}" for f, p in zip(files, parts, strict=True) for line in p.changes]
    names = ", ".join(file.stem for file in files)
    return Dataset(
        images=torch.cat([part.images for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        classes=max((part.classes for part in parts), key=len),
        name=source.name,
        changes=(f"concatenated {len(files)} files: {names}", *changes),
    )


def _dataset(source: Source, path: Path, labels_path: Path) -> Dataset:
    images, labels = read_npy_file(source, path), read_npy_file(source, labels_path)
    notes = []
    if images.ndim == _VIDEO_DIMENSIONS:
        count, frames = images.shape[:2]
        if labels.shape[:1] == (count,):
            labels = labels.repeat(frames, axis=0)
            notes.append(f"read {frames} frames of each of {count} sequences as images")
        images = images.reshape(count * frames, *images.shape[2:])
    check_image_shape(source, images.shape)
    n, count = len(images) if images.ndim else 0, len(labels) if labels.ndim else 0
    if count and n > count and n % count == 0:
        labels = np.concatenate([labels] * (n // count))
        notes.append(f"repeated {count} labels {n // count} times, for {n} images")
    return dataset_from_arrays(source, images=images, labels=labels, changes=notes)
