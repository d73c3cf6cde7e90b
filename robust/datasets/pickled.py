"""Builds tensors, arrays and images from the records of a pickle that was read as data.

Every shape is checked against the available bytes before anything is allocated.
"""

import math
import re
from collections.abc import Callable
from itertools import islice
from typing import TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from robust.datasets.errors import DatasetError
from robust.datasets.labels import Array
from robust.datasets.source import Source
from robust.datasets.unpickle import ByteText, Global, Persistent, Record

Storages = Callable[[object], Tensor]
"""Returns the flat tensor of a storage, given a reference or a storage pickled in place."""

_DTYPES = {
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "UntypedStorage": torch.uint8,
    "storage.UntypedStorage": torch.uint8,
}
# Types without a storage class: their tensors have an untyped one, and name the type themselves.
_LATER_DTYPES = {
    "torch.uint16": torch.uint16,
    "torch.uint32": torch.uint32,
    "torch.uint64": torch.uint64,
}
_BYTES_PER_PIXEL = {
    **dict.fromkeys(("L", "P"), 1),
    **dict.fromkeys(("LA", "La", "PA", "I;16", "I;16L", "I;16B"), 2),
    **dict.fromkeys(("RGB", "YCbCr", "LAB", "HSV"), 3),
    **dict.fromkeys(("RGBA", "RGBa", "RGBX", "CMYK", "I"), 4),
}
_ARRAYS = re.compile(r"numpy\.(core|_core)\.(multiarray\._reconstruct|numeric\._frombuffer)")
_SCALAR = re.compile(r"numpy\.(core|_core)\.multiarray\.scalar")
_LATER_TENSOR = "torch._utils._rebuild_tensor_v3"
_TENSORS = ("torch._utils._rebuild_tensor_v2", _LATER_TENSOR)
_PARAMETER = "torch._utils._rebuild_parameter"
_IMAGE = re.compile(r"PIL\..*")


def is_array(value: object) -> bool:
    """Whether a value of the tree is a tensor or a NumPy array."""
    return isinstance(value, Record) and (
        value.path in (*_TENSORS, _PARAMETER) or _ARRAYS.fullmatch(value.path) is not None
    )


def is_image(value: object) -> bool:
    """Whether a value of the tree is a PIL image."""
    return isinstance(value, Record) and _IMAGE.fullmatch(value.path) is not None


def is_scalar(value: object) -> bool:
    """Whether a value of the tree is a NumPy scalar."""
    return isinstance(value, Record) and _SCALAR.fullmatch(value.path) is not None


class Builder:
    """Builds tensors, arrays and images from records; raises DatasetError for invalid ones."""

    def __init__(self, source: Source, storages: Storages) -> None:
        self.source = source
        self._storages = storages

    def array(self, value: object) -> Array:
        """The tensor or NumPy array of a value for which `is_array` is true."""
        assert isinstance(value, Record)
        if value.path == _PARAMETER:
            inner = value.args[0] if value.args else None
            if not isinstance(inner, Record) or inner.path not in _TENSORS:
                raise self.source.error("a parameter", "one without a tensor")
            value = inner
        try:
            return self._tensor(value) if value.path in _TENSORS else self._ndarray(value)
        except DatasetError:
            raise
        except (IndexError, TypeError, ValueError, OverflowError, RuntimeError):
            raise self.source.error("a tensor or an array", "a damaged one") from None

    def number(self, value: object) -> int | float:
        """A plain number, a NumPy scalar or a tensor of one element."""
        if isinstance(value, int | float):
            if isinstance(value, int) and abs(value) > 2**53:
                raise self.source.error("whole-number labels", "one beyond 53 bits")
            return value
        if isinstance(value, Record) and is_scalar(value) and len(value.args) == 2:
            dtype, data = _dtype(value.args[0]), self._bytes(value.args[1])
            if dtype is not None and dtype.itemsize == len(data):
                return self.number(np.frombuffer(data, dtype)[0].item())
        if is_array(value):
            array = self.array(value)
            if array.ndim == 0:
                return self.number(array.item())
        found = value.path if isinstance(value, Record) else type(value).__name__
        raise self.source.error("whole-number labels", f"a label of type {found}")

    def image(self, value: object) -> Image.Image:
        """A PIL image in the mode that it was saved in."""
        assert isinstance(value, Record)
        state = value.state
        if not isinstance(state, list | tuple) or len(state) < 5:
            raise self.source.error("a PIL image", "one without its state")
        info, mode, size, palette, data = state[:5]
        pixels, sides = self._bytes(data), self._sides(size, "image")
        limit = self.source.limits.max_pixels
        if len(sides) != 2 or not isinstance(mode, str) or not 0 < math.prod(sides) <= limit:
            raise self.source.error(f"an image of 1 to {limit} pixels", "another size")
        if mode != "1" and mode not in _BYTES_PER_PIXEL:
            raise self.source.error("an image of 8 or 16 bits a channel", f"mode {mode[:8]!r}")
        width, height = sides
        row = (width + 7) // 8 if mode == "1" else width * _BYTES_PER_PIXEL[mode]
        if len(pixels) != row * height:
            found = f"{len(pixels)} bytes for {width}x{height}, mode {mode}"
            raise self.source.error("the pixels of an image", found)
        image = Image.frombytes(mode, (width, height), pixels)
        if palette is not None and mode in ("P", "PA"):
            try:
                image.putpalette(bytes(islice(palette, 768)))
            except (TypeError, ValueError):
                raise self.source.error("a palette of bytes", "another") from None
        transparency = info.get("transparency") if isinstance(info, dict) else None
        if mode == "P" and isinstance(transparency, bytes):
            image.info["transparency"] = transparency[:256]  # more make Pillow fail
        elif mode == "P" and _is_byte(transparency):
            image.info["transparency"] = transparency
        return image

    def image_bytes(self, value: object) -> int:
        """The number of pixel bytes in the record of a PIL image."""
        state = value.state if isinstance(value, Record) else None
        data = state[4] if isinstance(state, list | tuple) and len(state) > 4 else b""
        if isinstance(data, Record) and data.args and isinstance(data.args[0], str):
            return len(data.args[0])
        return len(data) if isinstance(data, bytes) else 0

    def _tensor(self, record: Record) -> Tensor:
        reference, offset, size, stride = record.args[:4]
        if not isinstance(reference, Persistent | Record) or not _is_count(offset):
            raise self.source.error("a tensor", "one without a storage")
        flat = self._storages(reference)
        if record.path == _LATER_TENSOR:
            flat = flat.view(self._later_dtype(record.args[6]))
        sides, steps = self._sides(size, "tensor"), self._sides(stride, "tensor")
        last = sum((side - 1) * step for side, step in zip(sides, steps, strict=True))
        count = math.prod(sides)
        # Elements are counted too, as a stride of 0 could make a huge tensor of a small storage.
        if count and (offset + last >= len(flat) or count > len(flat)):
            found = f"one beyond its {len(flat)} elements"
            raise self.source.error("a tensor inside its storage", found)
        return flat.as_strided(sides, steps, offset) if count else flat.new_empty(sides)

    def _later_dtype(self, value: object) -> torch.dtype:
        dtype = _LATER_DTYPES.get(value.path) if isinstance(value, Global) else None
        if dtype is None:
            raise self.source.error("a tensor of numbers", "one of another type")
        return dtype

    def _ndarray(self, record: Record) -> npt.NDArray[np.generic]:
        if record.path.endswith("._frombuffer"):
            data, dtype_record, shape, order = record.args
            fortran = order == "F"
        else:
            if not isinstance(record.state, tuple):
                raise self.source.error("an array", "one without its state")
            _, shape, dtype_record, fortran, data = record.state
        dtype, sides = _dtype(dtype_record), self._sides(shape, "array")
        if isinstance(data, list):
            raise self.source.error("a numeric array", "an object array")
        pixels = self._bytes(data)
        if dtype is None or math.prod(sides) * dtype.itemsize != len(pixels):
            found = f"{len(pixels)} bytes of another"
            raise self.source.error("a numeric array of its shape", found)
        values = np.frombuffer(bytearray(pixels), dtype=dtype)
        return values.reshape(sides, order="F" if fortran else "C")

    def _bytes(self, value: object) -> bytes:
        # Protocol 2 has no bytes: it writes latin-1 text and a call that encodes it.
        if isinstance(value, bytes):
            return value
        if isinstance(value, ByteText):
            return value.encode("latin-1")
        if isinstance(value, Record):
            if value.path == "builtins.bytes" and not value.args:
                return b""
            if value.path == "_codecs.encode" and len(value.args) == 2:
                text, encoding = value.args
                if isinstance(text, str) and encoding in ("latin1", "latin-1"):
                    try:
                        return text.encode("latin-1")
                    except UnicodeEncodeError:
                        pass
        raise self.source.error("bytes", "something else")

    def _sides(self, value: object, what: str) -> tuple[int, ...]:
        if isinstance(value, Record) and value.path == "torch.Size" and len(value.args) == 1:
            value = value.args[0]
        sides = tuple(value) if isinstance(value, tuple | list) else (None,)
        counts = tuple(side for side in sides if _is_count(side))
        if len(counts) != len(sides) or len(sides) > 8:
            article = "an" if what[0] in "aei" else "a"
            raise self.source.error(f"{article} {what}", "an invalid shape")
        return counts


def storage_dtype(storage: object) -> torch.dtype | None:
    """The element type of a storage class named in the tree; None for other names."""
    if not isinstance(storage, Global):
        return None
    return _DTYPES.get(storage.path.removeprefix("torch."))


def _dtype(record: object) -> np.dtype[np.generic] | None:
    if not isinstance(record, Record) or record.path != "numpy.dtype" or not record.args:
        return None
    code, state = record.args[0], record.state
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else "="
    if not isinstance(code, str) or not re.fullmatch(r"[biuf][1248]", code):
        return None
    try:
        return np.dtype(f"{order}{code}") if order in ("<", ">", "=", "|") else None
    except TypeError:
        return None


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _is_byte(value: object) -> bool:
    return _is_count(value) and value <= 255
