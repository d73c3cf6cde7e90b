"""The names of norms, stems and activations, and limits; without torch, to be read quickly."""

from __future__ import annotations

from typing import Literal, get_args

Norm = Literal["linf", "l2"]
NORMS: tuple[Norm, ...] = get_args(Norm)

Stem = Literal["imagenet", "cifar"]
STEMS: tuple[Stem, ...] = get_args(Stem)

Activation = Literal["relu", "silu"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

MAX_CLASSES = 100_000  # more than any real dataset; a broken file must not use all memory

Rgb = tuple[float, float, float]
# Mean and std of the pixels of these datasets, as in torchvision's and DeepMind's code.
IMAGENET: tuple[Rgb, Rgb] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10: tuple[Rgb, Rgb] = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
CIFAR100: tuple[Rgb, Rgb] = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
