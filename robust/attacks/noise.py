"""Random numbers that belong to an image, not to its position in a batch.

Each number is a hash of the seed, the pixels of the image, a stream (the purpose of the draw) and a
position. So an attack treats an image the same in any batch, in any order and on any device, and
an interrupted run resumes with the same numbers.
Source: splitmix64, Steele, Lea, Flood 2014, doi:10.1145/2714064.2660195.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def image_keys(x: Tensor, seed: int) -> Tensor:
    """A key for each image of float32 (N, C, H, W), int64 (N,); equal images have equal keys."""
    bits = x.detach().float().contiguous().view(torch.int32).flatten(1).long()
    weights = _mix(torch.arange(1, bits.shape[1] + 1, device=x.device) * _GOLDEN) | 1
    return _mix((bits * weights).sum(dim=1) + _mix(torch.tensor(seed + 1, device=x.device)))


def uniform(keys: Tensor, stream: Tensor | int, count: int) -> Tensor:
    """Uniform numbers in [0, 1), float32 (N, count); `stream` is an int, or int64 (N,) per key."""
    if isinstance(stream, int):
        stream = torch.full_like(keys, stream)
    base = _mix(keys + stream * _GOLDEN).unsqueeze(1)
    place = torch.arange(1, count + 1, device=keys.device) * _GOLDEN
    return ((_mix(base + place) >> 40) & 0xFFFFFF).float() * 2.0**-24


def normal(keys: Tensor, stream: Tensor | int, count: int) -> Tensor:
    """Standard normal numbers, float32 (N, count)."""
    centered = uniform(keys, stream, count) * 2 - (1 - 2.0**-24)
    return torch.erfinv(centered) * math.sqrt(2)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: int64 has a sign, a hash has none."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
