"""Re-checks every success on the exact model, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from robust.attacks.passes import Passes
from robust.evaluation.journal import Row
from robust.evaluation.models import check_finite
from robust.geometry import distance, where_float64_exists
from robust.threat_model import TOLERANCE, ThreatModel


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The exact predictions for N adversarial images, and which of them are successes."""

    confirmed: Tensor  # bool (N,): another class than the label, in the ball and in [0, 1]
    predicted: Tensor  # int64 (N,)
    distance: Tensor  # float32 (N,), in the norm of the ball


def verify(exact: Passes, x_adv: Tensor, x: Tensor, *, y: Tensor, ball: ThreatModel) -> Verdict:
    """Classify `x_adv` float32 (N, C, H, W) of images `x` with labels `y` int64 (N,).

    Recomputes everything. Raises ModelError for logits that are not finite.
    """
    logits = exact.logits(x_adv)
    check_finite(logits)
    predicted = logits.argmax(dim=1)
    wide_adv, wide = (where_float64_exists(images).double() for images in (x_adv, x))
    measured = distance(wide_adv, wide, ball.norm)
    in_range = ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(dim=1)
    in_ball = (measured <= ball.eps + TOLERANCE * max(1.0, ball.eps)).to(x.device)
    return Verdict(
        confirmed=(predicted != y) & in_ball & in_range,
        predicted=predicted,
        distance=measured.float().to(x.device),
    )


def rows_of(columns: Sequence[Tensor | int]) -> list[Row]:
    """N rows of the journal, from columns that are tensors (N,) or one number for all rows."""
    n = next(len(column) for column in columns if isinstance(column, Tensor))
    lists = [column.tolist() if isinstance(column, Tensor) else [column] * n for column in columns]
    return [
        (int(i), int(f), int(p), float(d), int(u), int(fw), int(bw))
        for i, f, p, d, u, fw, bw in zip(*lists, strict=True)
    ]
