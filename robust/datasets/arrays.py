"""Converts arrays and tensors of any layout to a Dataset: channels, range, size and labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from robust.datasets.dataset import Dataset
from robust.datasets.labels import Array, class_names, numeric_tensor, read_labels
from robust.datasets.source import Source
from robust.images import fit_image, to_float, to_uint8

ROUNDING = 1e-6
"""How far outside [0, 1] a float may be to count as a rounding error."""

_CHUNK = 1 << 22  # values converted at a time


def dataset_from_arrays(
    source: Source,
    *,
    images: Array,
    labels: Array,
    classes: Sequence[str] | None = None,
    changes: Sequence[str] = (),
) -> Dataset:
    """Build a Dataset of images that are uint8 or float in [0, 1].

    `images` are `(N, 3, H, W)`, `(N, H, W, 3)`, gray with or without a channel axis, or flattened
    `(N, 3HW)` or `(N, HW)`; for `labels` see `read_labels`. Floats that are 8-bit levels (k / 255
    as float32) become uint8, which is the same image; others stay float32. Without `classes` the
    names are `0`, `1`, ... Raises DatasetError for anything else.
    """
    pixels, notes = _channels_first(source, numeric_tensor(source, "images", images))
    source.check_count(len(pixels))
    check_image_shape(source, pixels.shape)
    targets = read_labels(source, labels, count=len(pixels))
    names = class_names(source, targets, classes)
    fitted, converted = _converted(source, pixels)
    return Dataset(
        images=fitted,
        labels=targets,
        classes=names,
        name=source.name,
        changes=(*changes, *notes, *converted),
    )


def check_image_shape(source: Source, shape: Sequence[int]) -> None:
    """Raise DatasetError if images of this shape, in any layout, have too many pixels."""
    sides = [side for side in shape[1:] if side not in (1, 3)]
    pixels = math.prod(sides)
    if pixels > source.limits.max_pixels:
        found = "x".join(map(str, sides))
        raise source.error(f"images of at most {source.limits.max_pixels} pixels", found)


def resize_note(count: int, width: int, height: int, size: int) -> str:
    """The entry of `Dataset.changes` for resized images."""
    cropped = "" if width == height else ", cropped to the square in the center"
    return f"resized {_images(count)} from {width}x{height} to {size}x{size}{cropped}"


def conversion_notes(*, several_frames: int, deep: int, transparent: int) -> list[str]:
    """The entries of `Dataset.changes` for images that are not one opaque image of 8 bits."""
    notes = []
    if several_frames:
        files = "1 file" if several_frames == 1 else f"{several_frames} files"
        notes.append(f"used the first of several frames of {files}")
    if deep:
        notes.append(f"reduced {_images(deep)} to 8 bits per channel")
    if transparent:
        notes.append(f"put {_images(transparent)} with transparency on white")
    return notes


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _channels_first(source: Source, images: Tensor) -> tuple[Tensor, list[str]]:
    """Images of any layout as (N, C, H, W), and notes. Raises DatasetError."""
    shape, notes = tuple(images.shape), []
    if images.ndim == 2 and (sides := _sides_of_row(shape[1])):
        notes = [f"read rows of {shape[1]} values as images {'x'.join(map(str, sides))}"]
        images = images.reshape(shape[0], *sides)
    elif images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and shape[1] != 3 and (shape[3] == 3 or shape[1] != 1):
        images = images.permute(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in shape[1:]:
        expected = "images (N, 3, H, W), (N, H, W, 3) or gray (N, H, W)"
        raise source.error(expected, f"shape {shape}")
    return images, notes


def _sides_of_row(length: int) -> tuple[int, int, int] | None:
    for channels in (3, 1):
        side = math.isqrt(length // channels)
        if side > 1 and channels * side * side == length:
            return channels, side, side
    return None


def _chunks(images: Tensor) -> Iterator[tuple[slice, Tensor]]:
    rows = max(1, _CHUNK // max(images[0].numel(), 1))
    for start in range(0, len(images), rows):
        part = slice(start, min(start + rows, len(images)))
        yield part, images[part]


def _converted(source: Source, images: Tensor) -> tuple[Tensor, list[str]]:
    """Images (N, 1 or 3, H, W) as uint8 or float32 (N, 3, size, size), and notes."""
    size, (height, width) = source.size, images.shape[2:]
    notes: list[str] = []
    if images.is_floating_point():
        eight_bits = _check_floats(source, images, notes)
    elif images.dtype == torch.uint8:
        eight_bits = True
    else:
        raise source.error("uint8 images, or floats in [0, 1]", str(images.dtype))
    dtype = torch.uint8 if eight_bits else torch.float32
    source.check_output(len(images), dtype.itemsize)
    if (height, width) == (size, size) and images.dtype == dtype and images.shape[1] == 3:
        # Nothing to convert: shares the memory of the file.
        return (images if eight_bits else images.clamp(0, 1)).contiguous(), notes
    if (height, width) != (size, size):
        source.check_fitted(len(images))
        notes.append(resize_note(len(images), width, height, size))
    fitted = torch.empty((len(images), 3, size, size), dtype=dtype)
    for part, chunk in _chunks(images):
        if not eight_bits:
            fitted[part] = _fit_floats(chunk.to(torch.float32).clamp(0, 1), size)
            continue
        levels = to_uint8(chunk.to(torch.float32)) if chunk.is_floating_point() else chunk
        fitted[part] = levels if (height, width) == (size, size) else _fit_levels(levels, size)
    return fitted, notes


def _check_floats(source: Source, images: Tensor, notes: list[str]) -> bool:
    """Whether all values are 8-bit levels; adds notes on clipped and rounded values.

    Raises DatasetError for NaN and for values outside [0, 1].
    """
    low, high, levels, outside, rounded = math.inf, -math.inf, True, 0, 0
    for _, chunk in _chunks(images):
        floats = chunk.to(torch.float32)
        least, most = floats.min().item(), floats.max().item()
        if not (math.isfinite(least) and math.isfinite(most)):
            raise source.error("floats in [0, 1]", "NaN or infinity")
        low, high = min(low, least), max(high, most)
        outside += int(((floats < 0) | (floats > 1)).sum())
        levels = levels and torch.equal(to_float(to_uint8(floats)), floats.clamp(0, 1))
        if chunk.dtype == torch.float64:
            rounded += int((floats.double() != chunk).sum())
    if low < -ROUNDING or high > 1 + ROUNDING:
        # As float32 prints: enough digits to identify the value.
        found = f"values from {np.float32(low)!s} to {np.float32(high)!s}"
        raise source.error("floats in [0, 1]", found)
    if outside:
        notes.append(f"clipped {outside} values outside [0, 1] by less than {ROUNDING:g}")
    if rounded and not levels:
        notes.append(f"rounded {rounded} values from float64 to float32")
    return levels


def _fit_levels(images: Tensor, size: int) -> Tensor:
    rows = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
    return torch.stack([fit_image(Image.fromarray(row), size) for row in rows])


def _fit_floats(images: Tensor, size: int) -> Tensor:
    """`fit_image` for floats: center crop, antialiased bicubic resize, clipping."""
    height, width = images.shape[2:]
    if (height, width) == (size, size):
        return images
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = images[..., top : top + side, left : left + side]
    if side == size:
        return square
    return interpolate(square, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
