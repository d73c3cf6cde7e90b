"""A labelled image set in memory."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from robust.datasets.errors import DatasetError


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Labelled 8-bit images.

    Raises DatasetError when the tensors don't fit each other or the class names.
    """

    images: Tensor
    """uint8 `(N, 3, H, W)`."""
    labels: Tensor
    """int64 `(N,)` in `[0, len(classes))`."""
    classes: tuple[str, ...]
    """A name for each label."""
    name: str
    """Where the data came from: a file's name or a built-in set's."""

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            found = f"{images.dtype} {tuple(images.shape)}"
            raise DatasetError(self.name, expected="uint8 images (N, 3, H, W)", found=found)
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            found = f"{labels.dtype} {tuple(labels.shape)}"
            expected = f"int64 labels ({images.shape[0]},), one for each image"
            raise DatasetError(self.name, expected=expected, found=found)
        check_labels(self, len(self.classes))

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of shapes, image bytes and labels, in hexadecimal."""
        digest = hashlib.sha256(str((tuple(self.images.shape), len(self))).encode())
        digest.update(self.images.cpu().contiguous().numpy().data)
        digest.update(self.labels.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def subset(self, indices: Tensor | Sequence[int]) -> "Dataset":
        """The images at `indices` (int64, any order), with the same classes and name."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def limit(self, count: int) -> "Dataset":
        """The first `count` images, or all when there are fewer."""
        return replace(self, images=self.images[:count], labels=self.labels[:count])

    def class_counts(self) -> tuple[int, ...]:
        """How many images each class has, in label order."""
        return tuple(torch.bincount(self.labels, minlength=len(self.classes)).tolist())


def check_labels(dataset: Dataset, num_classes: int) -> None:
    """Raise DatasetError unless every label lies in `[0, num_classes)`."""
    if len(dataset) == 0:
        return
    low, high = int(dataset.labels.min()), int(dataset.labels.max())
    if low < 0 or high >= num_classes:
        expected = f"labels from 0 to {num_classes - 1}"
        raise DatasetError(dataset.name, expected=expected, found=f"labels from {low} to {high}")
