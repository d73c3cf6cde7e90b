"""Files of `torch.save`, in the zip and in the older form, read without trusting their pickle."""

import logging
import re
import struct
import sys
from collections.abc import Callable, Mapping, Sequence, Sized

import numpy as np
import torch
from torch import Tensor

from robust.datasets.archive import Archive
from robust.datasets.arrays import check_count, class_names, dataset_from_arrays, whole_labels
from robust.datasets.dataset import Dataset
from robust.datasets.errors import DatasetError
from robust.datasets.pickled import Array, Builder, Storages, is_array, is_image, storage_dtype
from robust.datasets.unpickle import Persistent, Record, unpickle
from robust.images import ImageError, fit_image

logger = logging.getLogger(__name__)

_LEGACY_MAGIC = re.compile(
    rb"\x80[\x02-\x05](\x95.{8})?\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.", re.DOTALL
)

_FIELDS = (("images", "imgs", "data"), ("labels", "targets"))
_EXPECTED = "images and labels (or imgs, data; targets), a pair of them, or a TensorDataset"


def read_torch_zip(archive: Archive, *, size: int, max_images: int | None = None) -> Dataset:
    """Build a Dataset of a `torch.save` file, which is a zip with a pickle and its storages.

    Takes a dict or an object with images and labels, a pair, or a TensorDataset; images as a
    tensor, an array or a list of either or of PIL images. Raises DatasetError for anything else.
    """
    source = archive.source
    pickles = [name for name in archive.members if re.fullmatch(r"([^/]+/)?data\.pkl", name)]
    if len(pickles) != 1:
        raise DatasetError(source, expected="a file of torch.save", found="a zip of another kind")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.members and archive.read(f"{folder}byteorder") != b"little":
        raise DatasetError(source, expected="little-endian storages", found="another byte order")

    def raw(key: str) -> bytes:
        return archive.read(f"{folder}data/{key}")

    steps = _max_steps(max_images)
    tree, _, _ = unpickle(source, archive.read(pickles[0]), max_steps=steps)
    builder = Builder(source, _storages(source, raw))
    budget = sum(info.file_size for info in archive.members.values())
    return _Finder(source, builder, size, max_images, budget).dataset(tree)


def is_torch_legacy(data: bytes) -> bool:
    """Whether a file's first 32 bytes are those of the form used before torch 1.6."""
    return _LEGACY_MAGIC.match(data) is not None


def read_torch_legacy(
    source: str, data: bytes, *, size: int, max_images: int | None = None
) -> Dataset:
    """Build a Dataset of a `torch.save` file of the form used before torch 1.6.

    Takes and raises what `read_torch_zip` does.
    """
    steps = _max_steps(max_images)
    position = 0
    for _ in ("magic number", "protocol", "system"):
        _, position, _ = unpickle(source, data, position, max_steps=steps)
    tree, position, references = unpickle(source, data, position, max_steps=steps)
    keys, position, _ = unpickle(source, data, position, max_steps=steps)
    dtypes = {_storage_key(source, r): _storage_type(source, r) for r in references}
    chunks: dict[str, bytes] = {}
    for key in keys if isinstance(keys, list) else ():
        if key not in dtypes or len(data) < position + 8:
            raise DatasetError(source, expected="the storages of its tensors", found="others")
        (count,) = struct.unpack("<q", data[position : position + 8])
        length = count * dtypes[key].itemsize
        position += 8
        if count < 0 or position + length > len(data):
            raise DatasetError(source, expected="whole storages", found="a file cut short")
        chunks[key] = data[position : position + length]
        position += length

    def raw(key: str) -> bytes:
        if key not in chunks:
            raise DatasetError(source, expected="the storages of its tensors", found="others")
        return chunks[key]

    builder = Builder(source, _storages(source, raw))
    return _Finder(source, builder, size, max_images, len(data)).dataset(tree)


def _max_steps(max_images: int | None) -> int:
    # A PIL image takes some 30 operations, with rich metadata 100; an upload gets no more.
    return sys.maxsize if max_images is None else 10_000 + 200 * max_images


def _storage_type(source: str, reference: Persistent) -> torch.dtype:
    parts = reference.key
    dtype = storage_dtype(parts[1]) if isinstance(parts, tuple) and len(parts) >= 5 else None
    if dtype is None:
        raise DatasetError(source, expected="storages of numbers", found="another kind")
    return dtype


def _storage_key(source: str, reference: Persistent) -> str:
    parts = reference.key
    plain = isinstance(parts, tuple) and len(parts) >= 5 and parts[0] == "storage"
    key = parts[2] if isinstance(parts, tuple) and plain and not any(parts[5:]) else None
    if not isinstance(key, str):
        raise DatasetError(source, expected="storages of numbers", found="another reference")
    return key


def _storages(source: str, raw: Callable[[str], bytes]) -> Storages:
    loaded: dict[tuple[str, torch.dtype], Tensor] = {}

    def load(reference: Persistent) -> Tensor:
        key, dtype = _storage_key(source, reference), _storage_type(source, reference)
        if (key, dtype) not in loaded:
            data = bytearray(raw(key))
            if not data or len(data) % dtype.itemsize:
                loaded[key, dtype] = torch.empty(0, dtype=dtype)
            else:
                loaded[key, dtype] = torch.frombuffer(data, dtype=dtype)
        return loaded[key, dtype]

    return load


class _Finder:
    """Finds images and labels in a tree and makes a Dataset of them."""

    def __init__(
        self, source: str, builder: Builder, size: int, max_images: int | None, budget: int
    ) -> None:
        self.source = source
        self.builder = builder
        self.size = size
        self.max_images = max_images
        self.budget = budget
        """Bytes in the file: more pixels than that are one image named many times over."""

    def dataset(self, tree: object) -> Dataset:
        images, labels, classes = self._fields(tree)
        if not isinstance(images, list | tuple):
            return self._of_arrays(self._array(images), labels, classes)
        if not images:
            raise self._bad("at least one image", "none")
        check_count(self.source, len(images), self.max_images)
        if all(is_image(image) for image in images):
            targets = whole_labels(self.source, self._labels(labels), count=len(images))
            return Dataset(
                images=self._fitted(images),
                labels=targets,
                classes=class_names(self.source, targets, classes),
                name=self.source,
            )
        return self._of_arrays(self._stacked(images), labels, classes)

    def _fields(self, tree: object) -> tuple[object, object, list[str] | None]:
        fields = tree.state if isinstance(tree, Record) else tree
        if isinstance(fields, tuple) and len(fields) == 2 and isinstance(tree, Record):
            fields = fields[1]  # a class with slots: (its dict, its slots)
        if isinstance(fields, dict):
            pair = fields.get("tensors", tuple(_first(fields, names) for names in _FIELDS))
        else:
            pair = fields
        if not isinstance(pair, list | tuple) or len(pair) != 2 or any(x is None for x in pair):
            raise self._bad(_EXPECTED, _outline(tree))
        classes = fields.get("classes") if isinstance(fields, dict) else None
        named = isinstance(classes, list | tuple) and all(isinstance(c, str) for c in classes)
        return pair[0], pair[1], [str(c) for c in classes] if named and classes else None

    def _of_arrays(self, images: Array, labels: object, classes: list[str] | None) -> Dataset:
        return dataset_from_arrays(
            self.source,
            images=images,
            labels=self._labels(labels),
            classes=classes,
            size=self.size,
            max_images=self.max_images,
        )

    def _array(self, value: object) -> Array:
        if not is_array(value):
            raise self._bad("images as a tensor, an array or a list", _outline(value))
        return self.builder.array(value)

    def _labels(self, value: object) -> Array:
        if is_array(value):
            return self.builder.array(value)
        if not isinstance(value, list | tuple):
            raise self._bad("labels as a tensor, an array or a list", _outline(value))
        numbers = [self.builder.number(label) for label in value]
        return np.array(numbers, dtype=np.float64)

    def _fitted(self, images: Sequence[object]) -> Tensor:
        out = torch.empty((len(images), 3, self.size, self.size), dtype=torch.uint8)
        seen: dict[int, int] = {}
        resized = total = 0
        for index, record in enumerate(images):
            first = seen.setdefault(id(record), index)
            if first < index:
                out[index] = out[first]
                continue
            total += self.builder.image_bytes(record)
            self._within_budget(total)
            image = self.builder.image(record)
            resized += image.size != (self.size, self.size)
            try:
                out[index] = fit_image(image, self.size)
            except ImageError as error:
                raise self._bad(f"image {index} with {error.expected}", error.found) from None
        if resized:
            logger.info("%s: resized %d images to %d", self.source, resized, self.size)
        return out

    def _stacked(self, images: Sequence[object]) -> Array:
        arrays, total = [], 0
        for image in images:
            arrays.append(torch.as_tensor(self._array(image)))
            total += arrays[-1].nbytes
            self._within_budget(total)
        if len({(array.shape, array.dtype) for array in arrays}) > 1:
            raise self._bad("images of one shape and type", "several")
        return torch.stack(arrays)

    def _within_budget(self, total: int) -> None:
        if total > self.budget:
            raise self._bad(f"pixels of at most the file's {self.budget} bytes", "more")

    def _bad(self, expected: str, found: str) -> DatasetError:
        return DatasetError(self.source, expected=expected, found=found)


def _first(fields: Mapping[object, object], names: Sequence[str]) -> object:
    return next((fields[name] for name in names if name in fields), None)


def _outline(tree: object) -> str:
    """A few words on a tree, for messages."""
    if not isinstance(tree, Record):
        return f"a {type(tree).__name__}" + (f" of {len(tree)}" if isinstance(tree, Sized) else "")
    names = [str(key)[:20] for key in tree.state][:8] if isinstance(tree.state, dict) else []
    return f"a {tree.path[:80]}" + (f" with {', '.join(names)}" if names else "")
