"""Reads files of `torch.save`, in both its formats, and of `pickle.dump`, without running them."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from robust.datasets.dataset import Dataset
from robust.datasets.pickle_tree import Finder
from robust.datasets.pickled import Builder, Storages, storage_dtype
from robust.datasets.source import Source
from robust.datasets.unpickle import Persistent, Record, unpickle

_LEGACY_MAGIC = re.compile(
    rb"\x80[\x02-\x05](\x95.{8})?\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.", re.DOTALL
)
_PICKLE_MAGIC = re.compile(rb"\x80[\x02-\x05]")
_LOAD_FROM_BYTES = "torch.storage._load_from_bytes"
_BYTES_PER_STEP = 4
"""Smallest average number of file bytes per pickle operation; a PIL image has some 100."""


def read_pickle_file(source: Source) -> Dataset:
    """Build a Dataset of a file of `torch.save` or `pickle.dump`, recognized by content.

    Accepts a dict or an object with images and labels, a pair, a list of pairs, or a TensorDataset;
    images as a tensor, an array or a list of either or of PIL images. Nothing in the file is run.
    Raises DatasetError for anything else.
    """
    head = source.head(32)
    if head.startswith(b"PK"):
        return _read_zip(source)
    if _LEGACY_MAGIC.match(head):
        return _read_legacy(source)
    if _PICKLE_MAGIC.match(head):
        return _read_pickle(source)
    raise source.error(
        "a file of torch.save or pickle.dump (protocol 2 or later)",
        "a damaged one" if head.startswith(b"\x80") else "another kind of file",
    )


def is_pickle(head: bytes) -> bool:
    """Whether a file starts like a pickle, or like the format of torch before 1.6."""
    return _PICKLE_MAGIC.match(head) is not None


def _read_zip(source: Source) -> Dataset:
    with source.archive() as archive:
        pickles = [name for name in archive.members if re.fullmatch(r"([^/]+/)?data\.pkl", name)]
        if len(pickles) != 1:
            raise source.error("a file of torch.save", "a zip of another kind")
        folder = pickles[0].removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in archive.members and archive.read(order) != b"little":
            raise source.error("little-endian storages", "another byte order")

        def raw(key: str) -> bytearray:
            return archive.read(f"{folder}data/{key}")

        # The number of operations is bounded by the bytes in the file: compressed, they are cheap.
        size = sum(info.compress_size for info in archive.members.values())
        steps = _max_steps(source, size)
        tree, _, _ = unpickle(source.name, bytes(archive.read(pickles[0])), max_steps=steps)
        budget = sum(info.file_size for info in archive.members.values())
        builder = Builder(source, _storages(source, raw))
        return Finder(source, builder, budget).dataset(tree)


def _read_pickle(source: Source) -> Dataset:
    data = source.content

    def raw(key: str) -> bytes:
        raise source.error("tensors of torch.save", f"a storage {key[:20]} outside the pickle")

    tree, _, _ = unpickle(source.name, data, max_steps=_max_steps(source, len(data)))
    builder = Builder(source, _storages(source, raw))
    return Finder(source, builder, len(data)).dataset(tree)


def _read_legacy(source: Source) -> Dataset:
    tree, storages = _parse_legacy(source, source.content)
    return Finder(source, Builder(source, storages), len(source.content)).dataset(tree)


def _parse_legacy(source: Source, data: bytes) -> tuple[object, Storages]:
    """The format used before torch 1.6: five pickles, then the storages."""
    name, steps, position = source.name, _max_steps(source, len(data)), 0
    for _ in ("magic number", "protocol", "system"):
        _, position, _ = unpickle(name, data, position, max_steps=steps)
    tree, position, references = unpickle(name, data, position, max_steps=steps)
    keys, position, _ = unpickle(name, data, position, max_steps=steps)
    dtypes = dict(_storage(source, reference) for reference in references)
    chunks: dict[str, bytes] = {}
    for key in keys if isinstance(keys, list) else ():
        if not isinstance(key, str) or key not in dtypes or len(data) < position + 8:
            raise source.error("the storages of its tensors", "others")
        (count,) = struct.unpack("<q", data[position : position + 8])
        length = count * dtypes[key].itemsize
        position += 8
        if count < 0 or position + length > len(data):
            raise source.error("whole storages", "a file cut short")
        chunks[key] = data[position : position + length]
        position += length

    def raw(key: str) -> bytes:
        if key not in chunks:
            raise source.error("the storages of its tensors", "others")
        return chunks[key]

    return tree, _storages(source, raw)


def _max_steps(source: Source, size: int) -> int:
    return min(source.limits.max_steps, 10_000 + size // _BYTES_PER_STEP)


def _storage(source: Source, reference: object) -> tuple[str, torch.dtype]:
    """The key and the element type of a storage. Raises DatasetError."""
    parts = reference.key if isinstance(reference, Persistent) else None
    # ("storage", type, key, location, count), in the older format with a view of it, which is None.
    if isinstance(parts, tuple) and len(parts) in (5, 6) and not any(parts[5:]):
        kind, storage, key = parts[:3]
        dtype = storage_dtype(storage)
        if kind == "storage" and isinstance(key, str) and dtype is not None:
            return key, dtype
    raise source.error("storages of numbers", "another kind")


def _storages(source: Source, raw: Callable[[str], bytes | bytearray]) -> Storages:
    loaded: dict[object, Tensor] = {}

    def load(reference: object) -> Tensor:
        if isinstance(reference, Record):
            key = id(reference.args[0]) if reference.args else 0  # the same bytes are read once
            if key not in loaded:
                loaded[key] = _pickled_storage(source, reference)
            return loaded[key]
        name, dtype = _storage(source, reference)
        if (name, dtype) not in loaded:
            data = raw(name)
            data = data if isinstance(data, bytearray) else bytearray(data)  # writable
            if not data or len(data) % dtype.itemsize:
                loaded[name, dtype] = torch.empty(0, dtype=dtype)
            else:
                loaded[name, dtype] = torch.frombuffer(data, dtype=dtype)
        return loaded[name, dtype]

    return load


def _pickled_storage(source: Source, record: Record) -> Tensor:
    """A storage as `pickle.dump` writes it: the bytes of a nested `torch.save` file."""
    data = record.args[0] if record.path == _LOAD_FROM_BYTES and record.args else None
    if not isinstance(data, bytes) or not _LEGACY_MAGIC.match(data):
        raise source.error("storages of numbers", "another reference")
    reference, storages = _parse_legacy(source, data)
    if not isinstance(reference, Persistent):
        raise source.error("storages of numbers", "another reference")
    return storages(reference)
