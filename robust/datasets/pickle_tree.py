"""Finds images and labels in the tree of a pickle that was read as data."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from itertools import takewhile

import numpy as np
import torch

from robust.datasets.arrays import dataset_from_arrays
from robust.datasets.dataset import Dataset
from robust.datasets.errors import DatasetError
from robust.datasets.fields import (
    class_name_field,
    image_and_label_names,
    split_notes,
    unused_classes,
)
from robust.datasets.image_list import ImageList
from robust.datasets.labels import Array, class_names, numeric_tensor, read_labels
from robust.datasets.npz import labels_file, read_npy_file
from robust.datasets.pickled import Builder, is_array, is_image, is_scalar
from robust.datasets.source import Source
from robust.datasets.unpickle import Record
from robust.images import ImageError

_PAIR = "images and labels: a dict, an object or a pair of them, a list of pairs, a TensorDataset"
_SUBSET = "torch.utils.data.dataset.Subset"
_DEEPEST_SUBSET = 8
_KEY_LENGTH = 100


class Finder:
    """Finds images and labels in a tree and makes a Dataset of them; methods raise DatasetError.

    `budget` is the number of bytes in the file; more pixels mean one image referenced many times.
    """

    def __init__(self, source: Source, builder: Builder, budget: int) -> None:
        self.source = source
        self.builder = builder
        self.budget = budget
        self.changes: list[str] = []
        self._pairs: dict[int, tuple[object, object] | None] = {}  # in dicts, by id

    def dataset(self, tree: object, depth: int = 0) -> Dataset:
        if isinstance(tree, Record) and tree.path == _SUBSET and isinstance(tree.state, dict):
            return self._subset(tree.state, depth)
        images, labels, classes = self._fields(tree)
        if not isinstance(images, list | tuple):
            array = self._array(images)
            if array.ndim == 3 and is_number(labels) and 3 in (array.shape[0], array.shape[-1]):
                array, labels = array[None], [labels]  # one image and its label
            return self._of_arrays(array, self._labels(labels), classes)
        self.source.check_count(len(images))
        if all(is_image(image) for image in images):
            targets = read_labels(self.source, self._labels(labels), count=len(images))
            return self._of_images(images, targets, classes)
        return self._of_arrays(self._stacked(images), self._labels(labels), classes)

    def _subset(self, state: dict[object, object], depth: int) -> Dataset:
        if depth == _DEEPEST_SUBSET:
            raise self.source.error("a dataset", "subsets of subsets")
        whole = self.dataset(state.get("dataset"), depth + 1)
        indices = self._labels(state.get("indices"))
        chosen = torch.as_tensor(np.asarray(indices), dtype=torch.int64).reshape(-1)
        if len(chosen) == 0 or int(chosen.min()) < 0 or int(chosen.max()) >= len(whole):
            raise self.source.error(f"indices from 0 to {len(whole) - 1}", "others")
        self.source.check_count(len(chosen))
        return whole.subset(chosen)

    def _fields(self, tree: object) -> tuple[object, object, list[str] | None]:
        fields = tree.state if isinstance(tree, Record) else tree
        if isinstance(fields, tuple) and len(fields) == 2 and isinstance(tree, Record):
            fields = fields[1]  # a class with slots: (its dict, its slots)
        if isinstance(fields, dict):
            return self._named(fields)
        if isinstance(fields, list | tuple):
            pairs = list(takewhile(lambda pair: pair is not None, map(self._pair, fields)))
            if pairs and len(pairs) == len(fields):
                images, labels = zip(*filter(None, pairs), strict=True)
                return images, labels, None
            if len(fields) == 2 and None not in fields:
                return fields[0], fields[1], None
        raise self.source.error(_PAIR, _outline(tree))

    def _named(self, fields: dict[object, object]) -> tuple[object, object, list[str] | None]:
        if "tensors" in fields:  # a TensorDataset
            tensors = fields["tensors"]
            if not isinstance(tensors, list | tuple) or len(tensors) != 2:
                raise self.source.error("a TensorDataset of images and labels", _outline(tensors))
            return tensors[0], tensors[1], None
        values = {_text(key): value for key, value in fields.items() if value is not None}
        separate = labels_file(self.source)
        images, labels = image_and_label_names(
            self.source, values, labels_elsewhere=separate is not None
        )
        self.changes += split_notes(self.source, values, images)
        if labels is not None:
            targets = values[labels]
        else:
            assert separate is not None
            targets = read_npy_file(self.source, separate)
            self.changes.append(f"read the labels from {separate.name}")
        name = class_name_field(values)
        classes = None if name is None else _class_names(values[name])
        if name is not None and classes is None:
            self.changes.append(unused_classes(name))
        return values[images], targets, classes

    def _pair(self, item: object) -> tuple[object, object] | None:
        """The image and label of a list entry, `(image, label)` or a dict, or None."""
        if isinstance(item, dict):
            if id(item) not in self._pairs:  # the same large dict may be in the list many times
                self._pairs[id(item)] = self._pair_in_dict(item)
            item = self._pairs[id(item)]
        if not isinstance(item, list | tuple) or len(item) != 2:
            return None
        image, label = item
        if not (is_image(image) or is_array(image)):
            return None
        single = is_number(label) or (is_array(label) and self.builder.array(label).ndim == 0)
        return (image, label) if single else None

    def _pair_in_dict(self, item: dict[object, object]) -> tuple[object, object] | None:
        try:
            images, labels = image_and_label_names(self.source, map(_text, item))
        except DatasetError:
            return None
        return item.get(images), item.get(labels)

    def _of_arrays(self, images: Array, labels: Array, classes: list[str] | None) -> Dataset:
        return dataset_from_arrays(
            self.source, images=images, labels=labels, classes=classes, changes=self.changes
        )

    def _of_images(
        self, images: Sequence[object], targets: torch.Tensor, classes: list[str] | None
    ) -> Dataset:
        fitted = ImageList(self.source, len(images))
        seen: dict[int, int] = {}
        total = 0
        for index, record in enumerate(images):
            first = seen.setdefault(id(record), index)
            if first < index:
                fitted.repeat(first)
                continue
            total += self.builder.image_bytes(record)
            self._within_budget(total)
            try:
                fitted.add_image(self.builder.image(record))
            except ImageError as error:
                raise self.source.error(
                    f"image {index} with {error.expected}", error.found
                ) from None
        return fitted.dataset(
            targets, class_names(self.source, targets, classes), changes=self.changes
        )

    def _array(self, value: object) -> Array:
        if not is_array(value):
            raise self.source.error("images as a tensor, an array or a list", _outline(value))
        return self.builder.array(value)

    def _labels(self, value: object) -> Array:
        if isinstance(value, np.ndarray):  # from labels.npy
            return value
        if is_array(value):
            return self.builder.array(value)
        if not isinstance(value, list | tuple):
            raise self.source.error("labels as a tensor, an array or a list", _outline(value))
        if value and all(is_array(row) for row in value):
            if self.builder.array(value[0]).ndim == 1:
                return self._stacked(value, "one-hot labels")
        return np.array([self.builder.number(label) for label in value], dtype=np.float64)

    def _stacked(self, values: Sequence[object], what: str = "images") -> Array:
        arrays, total = [], 0
        for value in values:
            arrays.append(numeric_tensor(self.source, what, self._array(value)))
            total += arrays[-1].nbytes
            self._within_budget(total)
        if len({(array.shape, array.dtype) for array in arrays}) > 1:
            raise self.source.error(f"{what} of one shape and type", "several")
        return torch.stack(arrays)

    def _within_budget(self, total: int) -> None:
        if total > self.budget:
            raise self.source.error(f"pixels of at most the file's {self.budget} bytes", "more")


def is_number(value: object) -> bool:
    """Whether a value of the tree is a plain number or a NumPy scalar."""
    return isinstance(value, int | float) or is_scalar(value)


def _class_names(value: object) -> list[str] | None:
    """The names in a list, or in a dict from name to label; None for anything else."""
    if isinstance(value, dict) and all(isinstance(label, int) for label in value.values()):
        if sorted(value.values()) == list(range(len(value))):
            value = sorted(value, key=value.__getitem__)
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return [str(name) for name in value]
    return None


def _text(key: object) -> str:
    """The start of a key as text, longer than any known name; pickles from Python 2 have bytes."""
    if isinstance(key, bytes):
        return key[:_KEY_LENGTH].decode("latin-1")
    return str(key)[:_KEY_LENGTH]


def _outline(tree: object) -> str:
    """A short description of a tree, for messages."""
    if isinstance(tree, dict):
        return f"a dict with {', '.join(_text(key)[:20] for key in list(tree)[:8]) or 'nothing'}"
    if not isinstance(tree, Record):
        return f"a {type(tree).__name__}" + (f" of {len(tree)}" if isinstance(tree, Sized) else "")
    names = [str(key)[:20] for key in tree.state][:8] if isinstance(tree.state, dict) else []
    return f"a {tree.path[:80]}" + (f" with {', '.join(names)}" if names else "")
