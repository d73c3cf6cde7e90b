"""Batches of pixels, put together without torch.

Each operation of torch lets go of the interpreter and waits to get it back, which under load costs
a small batch more than its arithmetic. numpy's on a few kilobytes do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def together(images: Sequence[Tensor]) -> Tensor:
    """One batch (n, 3, H, W) of batches on the CPU, uint8 or float32 in [0, 1].

    Of bytes as long as all are, which is a quarter of what goes to the device.
    """
    if len(images) == 1:
        return images[0]
    arrays = [item.numpy() for item in images]
    if any(array.dtype != np.uint8 for array in arrays):
        arrays = [as_float(array) for array in arrays]
    return torch.from_numpy(np.concatenate(arrays))


def as_float(pixels: np.ndarray) -> np.ndarray:
    """Pixels uint8 as float32 in [0, 1], to the bit as `robust.images.to_float` has them."""
    if pixels.dtype != np.uint8:
        return pixels
    return pixels.astype(np.float32) / np.float32(255)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities float32 (N, K) of logits float32 (N, K)."""
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
    return probabilities
