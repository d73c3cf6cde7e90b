"""Sizes in pixel units as text, such as ``8/255``. Needs no torch."""

from __future__ import annotations

import math
import re

_DECIMAL = r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
_SIZE = re.compile(rf"{_DECIMAL}(?: */ *{_DECIMAL})?")


def parse_eps(value: str | float) -> float:
    """Read a size in pixel units, written ``8/255`` or as a number.

    Returns a finite float of at least 0. An Linf size must also be at most 1, which `ThreatModel`
    checks. Digits are ASCII without underscores. Raises ValueError that shows the value.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        if isinstance(value, str):
            numbers = _SIZE.fullmatch(value.strip(" "))
            if numbers is None:
                raise ValueError
            number = float(numbers[1]) / float(numbers[2] or 1)
        else:
            number = float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        shown = str(value)[:40]
        raise ValueError(f"expected a number or a fraction such as 8/255, got {shown!r}") from None
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"expected a finite size of at least 0, got {number}")
    return number


def format_eps(eps: float) -> str:
    """A size as text: ``8/255`` if it is a whole number of gray levels.

    Also ``0.5/255`` for halves and quarters, up to the first that is a short decimal, 0.05.
    """
    quarters = eps * 255 * 4
    whole = round(quarters)
    if eps <= 1 and abs(quarters - whole) < 4e-4 and (whole % 4 == 0 or whole < 0.05 * 255 * 4):
        return f"{whole / 4:g}/255"
    return f"{eps:g}"
