"""Arrays and tensors of whatever form to a Dataset: layout, range, size and labels."""

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from robust.datasets.dataset import Dataset
from robust.datasets.errors import DatasetError
from robust.images import fit_image, to_uint8

logger = logging.getLogger(__name__)

MAX_CLASSES = 10_000
_CHUNK = 1024


def dataset_from_arrays(
    source: str,
    *,
    images: Tensor | npt.NDArray[np.generic],
    labels: Tensor | npt.NDArray[np.generic],
    classes: Sequence[str] | None,
    size: int,
    max_images: int | None = None,
) -> Dataset:
    """Build a Dataset named `source` of `size` pixels a side.

    `images` are uint8 or float in [0, 1], `(N, 3, H, W)`, `(N, H, W, 3)`, or grey with one channel
    or none; `labels` are whole numbers `(N,)`. Without `classes` the names are `0`, `1`, ...
    Raises DatasetError for anything else, and for more than `max_images`.
    """
    pixels = _tensor(source, "images", images)
    if len(pixels) == 0:
        raise DatasetError(source, expected="at least one image", found="none")
    check_count(source, len(pixels), max_images)
    pixels = _channels_first(source, pixels)
    targets = whole_labels(source, labels, count=len(pixels))
    return Dataset(
        images=_resized(source, _uint8(source, pixels), size),
        labels=targets,
        classes=class_names(source, targets, classes),
        name=source,
    )


def check_count(source: str, count: int, max_images: int | None) -> None:
    """Raise DatasetError when there are more images than allowed."""
    if max_images is not None and count > max_images:
        raise DatasetError(source, expected=f"at most {max_images} images", found=str(count))


def whole_labels(source: str, values: Tensor | npt.NDArray[np.generic], *, count: int) -> Tensor:
    """Check labels of any numeric type `(N,)` or `(N, 1)` and return them as int64 `(N,)`."""
    labels = _tensor(source, "labels", values)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (count,):
        expected, found = f"{count} labels, one for each image", f"shape {tuple(labels.shape)}"
        raise DatasetError(source, expected=expected, found=found)
    if labels.dtype == torch.bool or labels.is_complex():
        raise DatasetError(source, expected="whole-number labels", found=str(labels.dtype))
    if not labels.is_floating_point():
        labels = labels.to(torch.int64)  # torch has no min and max for the wider unsigned types
    elif not torch.equal(labels, labels.round()):  # true for NaN, which equals nothing
        raise DatasetError(source, expected="whole-number labels", found="fractions or NaN")
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= MAX_CLASSES:
        expected = f"labels from 0 to at most {MAX_CLASSES - 1}"
        raise DatasetError(source, expected=expected, found=f"labels from {low} to {high}")
    return labels.to(torch.int64)


def class_names(source: str, labels: Tensor, classes: Sequence[str] | None) -> tuple[str, ...]:
    """The given class names, checked against the int64 labels, or `0`, `1`, ... when None."""
    needed = int(labels.max()) + 1
    if classes is None:
        return tuple(str(label) for label in range(needed))
    if needed > len(classes):
        found = f"{len(classes)} class names and a label {needed - 1}"
        raise DatasetError(source, expected="a class name for each label", found=found)
    return tuple(classes)


def _tensor(source: str, what: str, values: Tensor | npt.NDArray[np.generic]) -> Tensor:
    if values.ndim == 0:
        raise DatasetError(source, expected=f"a list of {what}", found="a single number")
    if isinstance(values, Tensor):
        return values.detach()
    if values.dtype.kind == "O":
        raise DatasetError(source, expected=f"numeric {what}", found="an object array")
    if values.dtype.kind not in "biuf" or values.dtype.itemsize > 8:
        raise DatasetError(source, expected=f"numeric {what}", found=f"dtype {values.dtype}")
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(native if native.flags.writeable else native.copy())


def _channels_first(source: str, images: Tensor) -> Tensor:
    shape = tuple(images.shape)
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and shape[1] != 3 and (shape[3] == 3 or shape[1] != 1):
        images = images.permute(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in shape:
        expected = "images (N, 3, H, W), (N, H, W, 3) or grey (N, H, W)"
        raise DatasetError(source, expected=expected, found=f"shape {shape}")
    return images.expand(-1, 3, -1, -1)


def _uint8(source: str, images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        return images.contiguous()
    if not images.is_floating_point():
        expected = "uint8 images, or floats in [0, 1]"
        raise DatasetError(source, expected=expected, found=str(images.dtype))
    parts = []
    for part in torch.split(images, _CHUNK):
        floats = part.to(torch.float32)
        low, high = floats.min().item(), floats.max().item()
        if not (low >= 0 and high <= 1):  # false for NaN
            finite = bool(torch.isfinite(floats).all())
            found = f"values from {low:.4g} to {high:.4g}" if finite else "NaN or infinity"
            raise DatasetError(source, expected="floats in [0, 1]", found=found)
        parts.append(to_uint8(floats))
    return torch.cat(parts)


def _resized(source: str, images: Tensor, size: int) -> Tensor:
    height, width = images.shape[2:]
    if (height, width) == (size, size):
        return images
    logger.info("%s: resizing %d images from %dx%d to %d", source, len(images), width, height, size)
    rows = images.permute(0, 2, 3, 1).contiguous().numpy()
    return torch.stack([fit_image(Image.fromarray(row), size) for row in rows])
