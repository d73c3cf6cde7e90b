"""Confidence interval of an accuracy."""

from __future__ import annotations

import math


def wilson_interval(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a proportion, 95% by default; (0, 1) for n = 0.

    Source: Wilson 1927, J. Am. Stat. Assoc. 22, 209-212.
    """
    if n == 0:
        return 0.0, 1.0
    share, square = correct / n, z * z
    middle = (share + square / (2 * n)) / (1 + square / n)
    reach = z / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    # Exactly 0 and 1 at the ends, where the formula is only off by rounding.
    low = max(0.0, middle - reach) if correct > 0 else 0.0
    return low, min(1.0, middle + reach) if correct < n else 1.0
