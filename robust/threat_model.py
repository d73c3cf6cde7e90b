"""Threat models: the eps ball around an image, and its geometry."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robust import geometry
from robust.choices import NORMS, Norm
from robust.geometry import distance, lengths, where_float64_exists
from robust.images import to_float
from robust.sizes import format_eps, parse_eps

__all__ = [
    "EPS_OF_8_BIT",
    "NORMS",
    "TOLERANCE",
    "Norm",
    "ThreatModel",
    "distance",
    "format_eps",
    "parse_eps",
]

# What `reaches_8_bit` expects of eps, for error messages.
EPS_OF_8_BIT = "0, or at least 1/255: no other 8-bit image is closer"

# Distances are compared in float32: exceeding eps by this much is rounding.
TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """The ball of radius `eps` in `norm`, in any case, around an image, cut by the range [0, 1].

    All methods take images float32 (N, C, H, W). `eps` is in pixel units: at most 1 for `linf`,
    any non-negative length for `l2`. Raises ValueError for another norm or size.
    """

    norm: Norm = "linf"
    eps: float = 8 / 255

    def __post_init__(self) -> None:
        if isinstance(self.norm, str):
            object.__setattr__(self, "norm", self.norm.lower())
        if self.norm not in NORMS:
            raise ValueError(f"expected norm to be one of {', '.join(NORMS)}, got {self.norm!r}")
        if isinstance(self.eps, str | bool | None):
            raise ValueError(f"expected eps as a number, such as 8 / 255, got {self.eps!r}")
        if not math.isfinite(self.eps) or self.eps < 0:
            raise ValueError(f"expected eps of at least 0, got {self.eps}")
        if self.norm == "linf" and self.eps > 1:
            raise ValueError(
                f"expected an linf eps in [0, 1] pixel units, such as 8/255, got {self.eps:g}"
            )

    def __str__(self) -> str:
        return f"{self.norm} {format_eps(self.eps)}"

    @property
    def reaches_8_bit(self) -> bool:
        """Whether eps is 0, or the ball around an 8-bit image contains another one."""
        return self.eps == 0 or self.eps >= 1 / 255 - TOLERANCE

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Distance of each pair of images in this norm, float32 (N,)."""
        return distance(x_adv, x, self.norm)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The projection of `x_adv` onto the ball around `x`, intersected with [0, 1]."""
        return geometry.project(x_adv, x, norm=self.norm, eps=self.eps)

    def noise(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A random offset within the radius: uniform for `linf`, uniform in volume for `l2`."""
        if self.norm == "linf":
            # Not a Gaussian: a small one vanishes in half precision.
            uniform = torch.rand(x.shape, generator=generator, device=x.device)
            return self.eps * (2 * uniform - 1)
        direction = torch.randn(x.shape, generator=generator, device=x.device)
        radius = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
        radius = radius ** (1 / x[0].numel())
        return self.eps * radius * direction / lengths(direction)

    def random_start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """`x` moved by `noise` and projected."""
        return self.project(x + self.noise(x, generator), x)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The steepest-ascent step of length one in this norm; 0 where `gradient` is 0."""
        return geometry.steepest(gradient, self.norm)

    def round_inside(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Round `x_adv` to 8 bits without leaving the ball around the 8-bit images `x`.

        The result is exactly what a PNG of it decodes to.
        """
        origin = (x * 255).round()
        levels = (x_adv * 255).round()
        if self.norm == "linf":
            most = math.floor(self.eps * 255 + 1e-4)
            levels = torch.clamp(levels, origin - most, origin + most)
        else:
            reach = self.eps * 255 * (1 + TOLERANCE)
            levels = origin + _shorten(levels - origin, x_adv * 255 - origin, reach)
        return to_float(levels.clamp(0, 255))


def _shorten(rounded: Tensor, exact: Tensor, reach: float) -> Tensor:
    """`rounded` with values moved one level toward zero until no row is longer than `reach`.

    Moves the values first that rounding increased most; moving all of those is enough.
    """
    whole, fine = (where_float64_exists(levels).flatten(1).double() for levels in (rounded, exact))
    overshoot = whole.abs() - fine.abs()
    order = overshoot.argsort(dim=1, descending=True)
    gain = torch.where(overshoot > 0, 2 * whole.abs() - 1, 0.0).gather(1, order)
    excess = whole.square().sum(dim=1, keepdim=True) - reach**2
    taken = (gain > 0) & (gain.cumsum(dim=1) - gain < excess)
    back = torch.zeros_like(whole).scatter(1, order, taken.double())
    return (whole - back * whole.sign()).to(rounded).view_as(rounded)
