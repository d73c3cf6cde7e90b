"""Upper bounds on the time of an evaluation, before the first attack and after each stage."""

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
    passes: int  # forward and backward passes, counted per image
    worst: int  # the same for a model with masked gradients
    seconds_per_pass: float
    stage: str = ""  # the finished stage; empty before the first
    processes: int = 1  # that share the images; this forecast is for one of them

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
    """Maximum passes, counted per image, of attacks and curve on images (N, C, H, W).

    With `worst` the maximum for a model with masked gradients.
    """
    passes = len(images) * sum(cost_of(attack, worst=worst) for attack in attacks)
    if attacks and curve:
        ball = attacks[0].threat_model
        point = resolve_attack(CURVE_ATTACK, ball)
        passes += min(curve, len(images)) * len(radii(ball, images[0])) * point.cost
    return passes


def cost_of(attack: AttackSettings, *, worst: bool) -> int:
    """Passes on an image that the attack doesn't fool."""
    return attack.cost if worst else attack.usual_cost


def forecast(
    images: Tensor, attacks: Sequence[AttackSettings], curve: int, *, seconds_per_pass: float
) -> Forecast:
    """The forecast of a whole evaluation of images (N, C, H, W).

    Includes one clean pass per image, and one per image and attack to verify a success.
    """
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
    """The forecast of the stages `rest` on the `images` that `stage` did not fool."""
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
