"""The names of norms, stems and activations; without torch, so that recipes list quickly."""

from __future__ import annotations

from typing import Literal, get_args

Norm = Literal["linf", "l2"]
NORMS: tuple[Norm, ...] = get_args(Norm)

Stem = Literal["imagenet", "cifar"]
STEMS: tuple[Stem, ...] = get_args(Stem)

Activation = Literal["relu", "silu"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
