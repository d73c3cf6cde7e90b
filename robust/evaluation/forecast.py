"""Estimates how long an evaluation takes, before it begins and after each stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from robust.attacks import AttackSettings, resolve_attack
from robust.evaluation.curve import CURVE_ATTACK, radii


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Upper bound on the remaining time; images that are fooled early take less."""

    images: int
    passes: int  # forward and backward passes of one image
    worst: int  # the same for a model with masked gradients
    seconds_per_pass: float
    stage: str = ""  # the one that left these images; empty before the first

    @property
    def seconds(self) -> float:
        """Total seconds."""
        return self.passes * self.seconds_per_pass

    @property
    def worst_seconds(self) -> float:
        """Total seconds if gradients are masked."""
        return self.worst * self.seconds_per_pass


def count_passes(
    images: Tensor, attacks: Sequence[AttackSettings], curve: int, *, worst: bool = False
) -> int:
    """The most passes, of one image each, that attacks and curve take on images (N, C, H, W).

    With `worst` those of a model whose gradients mislead.
    """
    passes = len(images) * sum(cost_of(attack, worst=worst) for attack in attacks)
    if attacks and curve:
        ball = attacks[0].threat_model
        point = resolve_attack(CURVE_ATTACK, ball)
        passes += min(curve, len(images)) * len(radii(ball, images[0])) * point.cost
    return passes


def cost_of(attack: AttackSettings, *, worst: bool) -> int:
    """Passes for an image that the attack doesn't fool."""
    return attack.cost if worst else attack.usual_cost


def forecast(
    images: Tensor, attacks: Sequence[AttackSettings], curve: int, *, seconds_per_pass: float
) -> Forecast:
    """For all images (N, C, H, W), each classified once as well, and each success checked."""
    passes, worst = (
        count_passes(images, attacks, curve, worst=worst) + len(images) * (1 + len(attacks))
        for worst in (False, True)
    )
    return Forecast(
        images=len(images), passes=passes, worst=worst, seconds_per_pass=seconds_per_pass
    )


def forecast_rest(
    stage: AttackSettings, rest: Sequence[AttackSettings], *, images: int, seconds_per_pass: float
) -> Forecast:
    """For the stages `rest` on the images that `stage` left."""
    passes, worst = (
        images * sum(1 + cost_of(item, worst=worst) for item in rest) for worst in (False, True)
    )
    return Forecast(
        images=images,
        passes=passes,
        worst=worst,
        seconds_per_pass=seconds_per_pass,
        stage=stage.label,
    )
