"""Augments a whole batch on its device, with random parameters per image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from training.recipe import Augmentation


def augment(x: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Crop, flip, rotate, jitter and cut out images float32 (N, 3, H, W) in [0, 1]; same shape.

    Crop and flip move whole pixels, so images stay 8-bit; the others interpolate or scale.
    """
    if settings.crop_padding or settings.flip:
        x = crop_and_flip(x, settings.crop_padding, settings.flip, generator)
    if settings.rotation:
        x = rotate(x, settings.rotation, generator)
    if settings.jitter:
        x = jitter(x, settings.jitter, generator)
    if settings.cutout:
        x = cutout(x, settings.cutout, generator)
    return x


def crop_and_flip(x: Tensor, padding: int, flip: float, generator: torch.Generator) -> Tensor:
    """Shift by up to `padding` pixels with reflected borders; mirror with probability `flip`."""
    n, _, height, width = x.shape
    device = x.device
    x = F.pad(x, (padding,) * 4, mode="reflect") if padding else x
    span = 2 * padding + 1
    top = torch.randint(span, (n, 1, 1), generator=generator, device=device)
    left = torch.randint(span, (n, 1, 1), generator=generator, device=device)
    mirrored = torch.rand(n, 1, 1, generator=generator, device=device) < flip
    rows = top + torch.arange(height, device=device).view(1, -1, 1)
    columns = torch.arange(width, device=device).view(1, 1, -1)
    columns = left + torch.where(mirrored, width - 1 - columns, columns)
    image = torch.arange(n, device=device).view(-1, 1, 1)
    return x.permute(0, 2, 3, 1)[image, rows, columns].permute(0, 3, 1, 2)


def rotate(x: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    """Rotate each image by up to `degrees`, bilinear, with reflected borders."""
    angle = _uniform(x, math.radians(degrees), generator).flatten()
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    ratio = x.shape[2] / x.shape[3]
    theta = torch.stack([cos, -sin * ratio, zero, sin / ratio, cos, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def jitter(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Scale brightness, contrast and saturation of each image by up to 1 +- `strength`."""
    x = x * (1 + _uniform(x, strength, generator))
    level = _gray(x).mean(dim=(2, 3), keepdim=True)
    x = level + (x - level) * (1 + _uniform(x, strength, generator))
    gray = _gray(x)
    x = gray + (x - gray) * (1 + _uniform(x, strength, generator))
    return x.clamp(0, 1)


def _gray(x: Tensor) -> Tensor:
    """Luminance of RGB images, (N, 1, H, W), without a tensor of weights to copy to a GPU."""
    red, green, blue = x.unbind(dim=1)
    return (0.299 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)


def cutout(x: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Set a square of `side` pixels around a random point to mid-gray, cut off at the border."""
    n, _, height, width = x.shape
    top = torch.randint(height, (n, 1, 1, 1), generator=generator, device=x.device) - side // 2
    left = torch.randint(width, (n, 1, 1, 1), generator=generator, device=x.device) - side // 2
    rows = torch.arange(height, device=x.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=x.device).view(1, 1, 1, -1)
    inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
    return x.masked_fill(inside, 0.5)


def mixup(
    x: Tensor, targets: Tensor, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Blend each image and its target distribution (N, K) with another one of the batch.

    The weight is drawn per image from Beta(alpha, alpha). Source: Zhang et al. 2018,
    arXiv:1710.09412.
    """
    n = len(x)
    # A Beta variable is a ratio of Gammas; torch's Gamma sampler takes a generator, Beta does not.
    gammas = torch._standard_gamma(
        torch.full((2, n), alpha, device=x.device, dtype=torch.float64), generator=generator
    )
    share = (gammas[0] / gammas.sum(dim=0).clamp_min(1e-300)).float()
    partner = torch.randperm(n, generator=generator, device=x.device)
    pixels = share.view(-1, 1, 1, 1)
    mixed = pixels * x + (1 - pixels) * x[partner]
    return mixed, share.view(-1, 1) * targets + (1 - share.view(-1, 1)) * targets[partner]


def _uniform(x: Tensor, limit: float, generator: torch.Generator) -> Tensor:
    noise = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
    return (2 * noise - 1) * limit
