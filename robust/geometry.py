"""The geometry of an eps ball around each image, cut by the pixel range [0, 1].

Images are float32 (N, C, H, W). `eps` is a number or one for each image, float32 (N,), in pixel
units. `threat_model.ThreatModel` is one such ball with its checks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robust.choices import Norm


def distance(x_adv: Tensor, x: Tensor, norm: Norm) -> Tensor:
    """Distance of each pair of images (N, C, H, W) in pixel units, float32 (N,)."""
    return _size((x_adv - x).flatten(1), norm)


def lengths(delta: Tensor, norm: Norm = "l2") -> Tensor:
    """Length of each row of `delta` in `norm`, float32 (N, 1, 1, 1)."""
    return _size(delta.flatten(1), norm).view(-1, 1, 1, 1)


def _size(flat: Tensor, norm: Norm) -> Tensor:
    if norm == "linf":
        return torch.maximum(flat.amax(dim=1), -flat.amin(dim=1))
    # Summed in float64: at 224x224 pixels a sum in float32 errs by more than the tolerance of eps.
    wide = where_float64_exists(flat)
    length: Tensor = torch.linalg.vector_norm(wide, dim=1, dtype=torch.float64).to(flat)
    return length


def where_float64_exists(x: Tensor) -> Tensor:
    """`x`, on the CPU if its device has no float64: Apple's MPS."""
    return x.cpu() if x.device.type == "mps" else x


def project(x_adv: Tensor, x: Tensor, *, norm: Norm, eps: Tensor | float) -> Tensor:
    """The projection of `x_adv` onto the ball around `x`, intersected with [0, 1]."""
    return projection(x, norm=norm, eps=eps)(x_adv)


def projection(x: Tensor, *, norm: Norm, eps: Tensor | float) -> Callable[[Tensor], Tensor]:
    """`project` for one `x` and many `x_adv`."""
    if isinstance(eps, Tensor) and eps.ndim == 1:
        eps = column(eps)
    if norm == "linf":
        low, high = (x - eps).clamp_min_(0), (x + eps).clamp_max_(1)
        return lambda x_adv: torch.clamp(x_adv, low, high)

    def pull(x_adv: Tensor) -> Tensor:
        delta = x_adv - x
        # Clipping to the pixel range afterwards moves pixels toward x, so it stays in the ball.
        scale = (eps / lengths(delta).clamp_min(1e-30)).clamp_max(1)
        return delta.mul_(scale).add_(x).clamp_(0, 1)

    return pull


def steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """The steepest-ascent step of length one in `norm`; 0 where `gradient` is 0."""
    if norm == "linf":
        return gradient.sign()
    # Scaled first: the squares of a tiny gradient would underflow to a zero length.
    gradient = gradient.nan_to_num()  # like `sign`: no direction for NaN
    scaled = gradient / gradient.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-30)
    return scaled / lengths(scaled).clamp_min(1e-12)


def column(values: Tensor) -> Tensor:
    """One value per image, (N,), as (N, 1, 1, 1) for use with images."""
    return values.view(-1, 1, 1, 1)
