"""8-bit images in a ball around an 8-bit image, for attacks whose results are 8-bit images.

Images are float32 (N, C, H, W), radii float32 (N,) in pixel units; a level is 1/255.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robust.choices import Norm
from robust.geometry import column, distance, project
from robust.images import to_float

HALVINGS = 8  # bisections of `closest`: all levels under linf
PUSHES = 8  # radii that `outward` tries
_SCALINGS = 12  # bisections of the scale in `_rescaled`
_ROUNDING = 1e-4  # of a level, or of a squared one


def snap(x_adv: Tensor, x: Tensor, *, norm: Norm, radius: Tensor) -> Tensor:
    """8-bit images in the balls around the 8-bit images `x`, in the direction of `x_adv`.

    Under `linf` `x_adv` is rounded to the nearest levels in the ball. Under `l2` rounding would
    undo small changes, so the change is rescaled first: the result is about as far from `x` as
    `x_adv`, and no farther.
    """
    origin = (x * 255).round()
    if norm == "linf":
        most = column(whole_levels(radius))
        levels = torch.clamp((x_adv * 255).round(), origin - most, origin + most)
    else:
        reach = torch.minimum(radius, distance(x_adv, x, norm)) * 255
        levels = origin + _rescaled(x_adv * 255 - origin, origin, reach)
    return to_float(levels.clamp(0, 255))


def _rescaled(delta: Tensor, origin: Tensor, reach: Tensor) -> Tensor:
    """`delta` scaled as far as its rounded length stays within `reach`, (N,), all in levels.

    Rounding a scaled gradient maximizes its product with whole numbers of the same length.
    """
    size = delta.abs().flatten(1)
    room = torch.where(delta > 0, 255 - origin, origin).flatten(1)
    most = reach.square().unsqueeze(1) * (1 + 1e-6) + _ROUNDING

    def rounded(scale: Tensor) -> Tensor:
        return torch.minimum((scale * size).round(), room)

    largest = size.amax(dim=1, keepdim=True).clamp_min(1e-12)
    low, high = 0.49 / largest, (reach.unsqueeze(1) + 1) / largest
    for _ in range(_SCALINGS):
        middle = (low * high).sqrt()
        fits = rounded(middle).square().sum(dim=1, keepdim=True) <= most
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    # Between the two scales, pixels go to the next level one by one, as long as there is room.
    whole, further = rounded(low), rounded(high)
    # They are few, so sorting them costs little.
    row, pixel = (further > whole).nonzero(as_tuple=True)
    order = ((whole[row, pixel] + 0.5) / size[row, pixel].clamp_min(1e-12)).argsort(stable=True)
    order = order[row[order].argsort(stable=True)]  # row by row
    row, pixel = row[order], pixel[order]
    price = (further[row, pixel].square() - whole[row, pixel].square()).long()
    total = price.new_zeros(len(size)).index_add_(0, row, price)
    spent = price.cumsum(dim=0) - (total.cumsum(dim=0) - total)[row]
    left = (most - whole.square().sum(dim=1, keepdim=True)).squeeze(1)
    taken = spent <= left[row]
    whole[row[taken], pixel[taken]] = further[row[taken], pixel[taken]]
    return whole.view_as(delta) * delta.sign()


def whole_levels(radius: Tensor) -> Tensor:
    """The levels within `radius`, as whole numbers."""
    return (radius * 255 + _ROUNDING).floor()


def middle_radius(low: Tensor, high: Tensor, norm: Norm) -> Tensor:
    """The radius to try next between two; a whole number of levels under `linf`."""
    middle = (low + high) / 2
    return whole_levels(middle) / 255 if norm == "linf" else middle


def adjacent(low: Tensor, high: Tensor, norm: Norm) -> Tensor:
    """Whether no 8-bit image is farther than `low` and closer than `high`, bool (N,).

    Counts levels under `linf`, squared levels under `l2`.
    """
    power = 1 if norm == "linf" else 2
    return (high * 255) ** power - (low * 255) ** power <= 1 + _ROUNDING


def closest(
    fools: Callable[[Tensor], Tensor], x_adv: Tensor, x: Tensor, *, norm: Norm
) -> tuple[Tensor, int]:
    """Pull 8-bit images that fool the model toward `x`, by bisection, as long as they fool it.

    `fools` returns the mask bool (N,) of 8-bit images that do. Also returns the number of its
    calls.
    """
    high = distance(x_adv, x, norm)
    low, calls = torch.zeros_like(high), 0
    while calls < HALVINGS and not bool(adjacent(low, high, norm).all()):
        radius = middle_radius(low, high, norm)
        tried = snap(project(x_adv, x, norm=norm, eps=radius), x, norm=norm, radius=radius)
        hit = fools(tried)
        calls += 1
        x_adv = torch.where(column(hit), tried, x_adv)
        low, high = torch.where(hit, low, radius), distance(x_adv, x, norm)
    return x_adv, calls


def outward(
    fools: Callable[[Tensor], Tensor], x_adv: Tensor, x: Tensor, *, norm: Norm, eps: float
) -> tuple[Tensor, int]:
    """Push images from `x_adv` away from `x`, up to `eps`, until their 8-bit images fool the model.

    For a point right at the decision boundary, which rounding moves back. Also returns the number
    of calls of `fools`, the mask bool (N,) of 8-bit images that do.
    """
    near = distance(x_adv, x, norm)
    missing = torch.ones_like(near, dtype=torch.bool)
    found, calls = x_adv, 0
    while calls < PUSHES and bool(missing.any()):
        calls += 1
        radius = near + (eps - near) * calls / PUSHES
        along = x + (x_adv - x) * column(radius / near.clamp_min(1e-12))
        tried = snap(along, x, norm=norm, radius=radius)
        found = torch.where(column(missing), tried, found)
        missing = missing & ~fools(tried)
    return found, calls
