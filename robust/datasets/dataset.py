"""A labeled image set in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from robust.datasets.errors import DatasetError
from robust.images import to_uint8

DTYPES = {"uint8": torch.uint8, "float32": torch.float32}
"""The types of images, by `Dataset.dtype`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Labeled images, 8-bit or float.

    Raises DatasetError if the tensors don't match each other or the class names.
    """

    images: Tensor
    """`(N, 3, H, W)`: uint8, or float32 in [0, 1] if rounding to 8 bits would change the images."""
    labels: Tensor
    """int64 `(N,)` in `[0, len(classes))`."""
    classes: tuple[str, ...]
    """A name for each label."""
    name: str
    """The name of the file or of the built-in dataset."""
    changes: tuple[str, ...] = ()
    """What was resized, skipped, clipped or guessed in reading, with counts; one line each."""

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype not in DTYPES.values() or images.ndim != 4 or images.shape[1] != 3:
            found = f"{images.dtype} {tuple(images.shape)}"
            raise DatasetError(
                self.name, expected="uint8 or float32 images (N, 3, H, W)", found=found
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            found = f"{labels.dtype} {tuple(labels.shape)}"
            expected = f"int64 labels ({images.shape[0]},), one for each image"
            raise DatasetError(self.name, expected=expected, found=found)
        check_labels(self, len(self.classes))

    def __repr__(self) -> str:
        shape, classes = tuple(self.images.shape), len(self.classes)
        return f"Dataset({self.name!r}: images {self.dtype} {shape}, {classes} classes)"

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def dtype(self) -> str:
        """`uint8` or `float32`."""
        return str(self.images.dtype).removeprefix("torch.")

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of shapes, type, image bytes and labels, in hexadecimal."""
        about: tuple[object, ...] = (tuple(self.images.shape), len(self))
        if self.dtype != "uint8":  # recorded hashes of 8-bit sets don't include the type
            about = (*about, self.dtype)
        digest = hashlib.sha256(str(about).encode())
        digest.update(self.images.cpu().contiguous().numpy().data)
        digest.update(self.labels.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def subset(self, indices: Tensor | Sequence[int]) -> Dataset:
        """The images at `indices` (int64, any order), with the same classes, name and changes."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def limit(self, count: int) -> Dataset:
        """The first `count` images, or all if there are fewer."""
        return replace(self, images=self.images[:count], labels=self.labels[:count])

    def in_8_bits(self) -> Dataset:
        """The same set with uint8 images; floats are rounded, and `changes` says so."""
        if self.dtype == "uint8":
            return self
        changes = (*self.changes, f"rounded {len(self)} images from float32 to 8 bits")
        return replace(self, images=to_uint8(self.images), changes=changes)

    def class_counts(self) -> tuple[int, ...]:
        """The number of images per class, in label order."""
        return tuple(torch.bincount(self.labels, minlength=len(self.classes)).tolist())


def check_labels(dataset: Dataset, num_classes: int) -> None:
    """Raise DatasetError unless every label lies in `[0, num_classes)`."""
    if len(dataset) == 0:
        return
    low, high = int(dataset.labels.min()), int(dataset.labels.max())
    if low < 0 or high >= num_classes:
        expected = f"labels from 0 to {num_classes - 1}"
        raise DatasetError(dataset.name, expected=expected, found=f"labels from {low} to {high}")


def check_trainable(dataset: Dataset) -> None:
    """Raise DatasetError unless there are images of at least two classes to train on."""
    if len(dataset) == 0 or int(dataset.labels.min()) == int(dataset.labels.max()):
        seen = f"{len(dataset)} of class {int(dataset.labels[0])} only" if len(dataset) else "none"
        raise DatasetError(dataset.name, expected="images of two classes or more", found=seen)
