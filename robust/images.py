"""Images as tensors: from bytes to the model's input, and from 8-bit tensors to PNG.

`image_decoding.py` does the work, without torch.
"""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

from robust.image_decoding import (
    decode_image,
    fit_pixels,
    open_image,
    read_pixels,
    to_rgb,
)
from robust.image_headers import MAX_PIXELS, ErrorKind, ImageError

__all__ = [
    "MAX_PIXELS",
    "ErrorKind",
    "ImageError",
    "decode_image",
    "encode_png",
    "fit_image",
    "open_image",
    "read_image",
    "to_float",
    "to_rgb",
    "to_uint8",
]


def read_image(data: bytes, size: int, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode an image as `decode_image` does and fit it as `fit_image` does: uint8 (3, size, size).

    Raises ImageError, and nothing else.
    """
    return torch.from_numpy(read_pixels(data, size, max_pixels=max_pixels))


def fit_image(image: Image.Image, size: int) -> Tensor:
    """Center-crop to a square and resize, antialiased, to a uint8 tensor `(3, size, size)`.

    An image that already has that size is returned unchanged.
    """
    return torch.from_numpy(fit_pixels(image, size))


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 images, or whole levels from 0 to 255, of any shape to float32 in [0, 1].

    Bit-equal on every device. The divisor is a tensor because CUDA replaces a division by a number
    with a product with its reciprocal, which rounds half of the levels differently.
    """
    return images.to(torch.float32) / torch.full((), 255.0, device=images.device)


def to_uint8(images: Tensor) -> Tensor:
    """Round float images in [0, 1] of any shape to the nearest uint8, clipping values outside."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def encode_png(image: Tensor) -> bytes:
    """Encode a uint8 image `(3, H, W)` as PNG, losslessly; raises ValueError for other tensors."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        found = f"{image.dtype} {tuple(image.shape)}"
        raise ValueError(f"expected a uint8 image (3, H, W), found {found}")
    buffer = io.BytesIO()
    pixels = image.detach().cpu().permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
