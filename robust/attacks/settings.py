"""Attacks by name, with the parameters people leave out filled in."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from robust.attacks.frozen import Model
from robust.attacks.pgd import fgsm, pgd
from robust.attacks.result import AttackResult
from robust.threat_model import Norm, ThreatModel

ATTACKS = ("fgsm", "pgd")
DEFAULT_ATTACKS = ("fgsm", "pgd")
DEFAULT_STEPS = 20
DEFAULT_EPS: dict[Norm, float] = {"linf": 8 / 255, "l2": 0.5}  # pixel units


@dataclass(frozen=True, kw_only=True)
class AttackSettings:
    """An attack with every parameter resolved. Sizes are in pixel units."""

    name: str
    threat_model: ThreatModel
    alpha: float
    steps: int
    restarts: int
    random_start: bool
    seed: int

    @property
    def label(self) -> str:
        """The name with its budget, such as ``pgd-20`` or ``pgd-20x5`` with 5 restarts."""
        if self.name == "fgsm":
            return "fgsm"
        return f"{self.name}-{self.steps}" + (f"x{self.restarts}" if self.restarts > 1 else "")

    @property
    def cost(self) -> int:
        """Most forward and backward passes an image can take, counted alike."""
        return self.restarts * (2 * self.steps + 1)

    def run(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        target: Tensor | None = None,
        early_stop: bool = False,
        generator: torch.Generator | None = None,
    ) -> AttackResult:
        """Attack images float32 (N, C, H, W) in [0, 1] with labels int64 (N,), as `pgd` says."""
        if self.name == "fgsm":
            return fgsm(model, x, y, threat_model=self.threat_model, target=target)
        if generator is None:
            generator = torch.Generator(x.device).manual_seed(self.seed)
        return pgd(
            model,
            x,
            y,
            threat_model=self.threat_model,
            alpha=self.alpha,
            steps=self.steps,
            restarts=self.restarts,
            random_start=self.random_start,
            early_stop=early_stop,
            target=target,
            generator=generator,
        )


def resolve_attack(
    name: str,
    threat_model: ThreatModel,
    *,
    alpha: float | None = None,
    steps: int | None = None,
    restarts: int | None = None,
    random_start: bool = True,
    seed: int = 0,
) -> AttackSettings:
    """Fill in what is left out; ``pgd-50`` is `pgd` with 50 steps.

    `alpha` is eps for `fgsm`; for `pgd` a quarter of eps, more where so few steps could not cross
    the ball. `fgsm` takes none of the parameters and leaves them unused. Raises ValueError for an
    unknown attack, or steps and restarts below 1.
    """
    match = re.fullmatch(r"([a-z]+)(?:-([0-9]{1,6}))?", name)
    base = match[1] if match else name
    if match is None or base not in ATTACKS or (base == "fgsm" and match[2]):
        raise ValueError(
            f"expected an attack out of {', '.join(ATTACKS)} (or pgd-N), got {name[:40]!r}"
        )
    eps = threat_model.eps
    if base == "fgsm":
        return AttackSettings(
            name=base,
            threat_model=threat_model,
            alpha=eps,
            steps=1,
            restarts=1,
            random_start=False,
            seed=seed,
        )
    if steps is None:
        steps = int(match[2]) if match[2] else DEFAULT_STEPS
    restarts = 1 if restarts is None else restarts
    if steps < 1 or restarts < 1:
        raise ValueError(f"expected at least 1 step and 1 restart, got {steps} and {restarts}")
    if alpha is None:
        alpha = min(eps, max(eps / 4, 2.5 * eps / steps))
    return AttackSettings(
        name=base,
        threat_model=threat_model,
        alpha=alpha,
        steps=steps,
        restarts=restarts,
        random_start=random_start,
        seed=seed,
    )
