"""Images as tests read them back."""

from __future__ import annotations

import torch
from torch import Tensor

from robust.image_decoding import DecodeCost, decode_image, pixels_of, read_cheap_pixels


def decode_png(data: bytes) -> Tensor:
    """An image as uint8 (3, H, W) at its own size, the inverse of `encode_png`."""
    return torch.from_numpy(pixels_of(decode_image(data)))


def decode_cost(data: bytes, *, size: int, **limits: int) -> DecodeCost:
    """The cost by which the service decides where to decode an image."""
    free = DecodeCost(memory=0, work=0)
    found = read_cheap_pixels(data, size, most=free, **limits)
    assert isinstance(found, DecodeCost)
    return found
