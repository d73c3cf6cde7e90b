"""The curve of accuracy over eps: one short attack at increasing radii."""

from __future__ import annotations

from torch import Tensor

from robust.evaluation.flags import large_eps
from robust.threat_model import ThreatModel

CURVE_ATTACK = "pgd-20"
CURVE = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # multiples of eps


def radii(ball: ThreatModel, image: Tensor) -> list[float]:
    """The eps of the curve for an image (C, H, W), up to one that no classifier can resist."""
    largest = large_eps(ball.norm, image.shape)
    found = {min(ball.eps * factor, largest) for factor in CURVE} | {ball.eps, largest}
    return sorted(radius for radius in found if radius > 0)
