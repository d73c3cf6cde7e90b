"""Operations on small batches with numpy instead of torch.

Every torch operation releases the GIL and waits to get it back, which under load takes longer than
the arithmetic of a small batch. numpy operations on a few kilobytes keep the GIL.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def concatenate(images: Sequence[Tensor]) -> Tensor:
    """One batch (n, 3, H, W) from batches on the CPU that are uint8 or float32 in [0, 1].

    The result is uint8 if all are: a quarter of the bytes to copy to the device.
    """
    if len(images) == 1:
        return images[0]
    arrays = [item.numpy() for item in images]
    if any(array.dtype != np.uint8 for array in arrays):
        arrays = [as_float(array) for array in arrays]
    return torch.from_numpy(np.concatenate(arrays))


def as_float(pixels: np.ndarray) -> np.ndarray:
    """Pixels uint8 as float32 in [0, 1], bit-equal to `robust.images.to_float`."""
    if pixels.dtype != np.uint8:
        return pixels
    return pixels.astype(np.float32) / np.float32(255)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities float32 (N, K) of logits float32 (N, K)."""
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
    return probabilities
