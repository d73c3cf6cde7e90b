"""Formats numbers for readers. Missing, NaN and infinite values are a dash."""

from __future__ import annotations

import math
from collections.abc import Sequence

NONE = "–"
_PHRASES = {  # for data whose name is not a dataset's
    "upload": "{n} uploaded {images}",  # named so by `load_upload`
    "held out from training": "{n} {images} held out from training",  # by robust train
}


def finite(value: object) -> float | None:
    """`value` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def percent(share: object, digits: int = 2) -> str:
    """A share in percent, without the percent sign."""
    number = finite(share)
    return NONE if number is None else f"{100 * number:.{digits}f}"


def decimal(value: object, digits: int = 3) -> str:
    """A number with `digits` digits after the point."""
    number = finite(value)
    return NONE if number is None else f"{number:.{digits}f}"


def significant(value: object, digits: int = 3) -> str:
    """A number with `digits` significant digits."""
    number = finite(value)
    return NONE if number is None else f"{number:.{digits}g}"


def count(value: object) -> str:
    """A whole number with thousands separators."""
    number = finite(value)
    return NONE if number is None else f"{round(number):,}"


def interval(bounds: Sequence[object]) -> str:
    """Two shares in percent, as ``33.6 to 36.3``."""
    low, high = bounds
    return f"{percent(low, 1)} to {percent(high, 1)}"


def duration(seconds: object) -> str:
    """Seconds as ``5.9 s``, ``3 min 13 s`` or ``1 h 53 min``."""
    number = finite(seconds)
    if number is None:
        return NONE
    if number < 99.95:
        return f"{number:.1f} s"
    minutes, rest = divmod(round(number), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def images_of(number: object, data: str) -> str:
    """A number of images with their source: ``10,000 images of cifar10``, ``1 uploaded image``."""
    images = f"image{'s' * (number != 1)}"
    phrase = _PHRASES.get(data, "{n} {images} of {data}")
    return phrase.format(n=count(number), images=images, data=data)


def listed(words: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
