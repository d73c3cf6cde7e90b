"""Attack settings: an attack's name and parameters, with defaults resolved."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from robust.attack_registry import ALIASES, REGISTRY, AttackEntry, did_you_mean
from robust.attacks.algorithm import Algorithm
from robust.attacks.checks import check_counts
from robust.attacks.frozen import Model
from robust.attacks.losses import classes_needed
from robust.attacks.pgd import PGD, relative
from robust.attacks.result import AttackResult
from robust.attacks.run import run_algorithm, run_stages
from robust.attacks.search import Cancelled
from robust.threat_model import Norm, ThreatModel, format_eps

DEFAULT_EPS: dict[Norm, float] = {"linf": 8 / 255, "l2": 0.5}  # pixel units


class UnknownAttack(ValueError):
    """There is no attack of this name."""


@dataclass(frozen=True, kw_only=True)
class AttackSettings:
    """An attack with every parameter resolved. Sizes are in pixel units."""

    name: str
    threat_model: ThreatModel
    alpha: float  # 0 where the attack has no fixed step size
    steps: int  # queries for `square`
    restarts: int
    random_start: bool
    seed: int
    own_stages: tuple[AttackSettings, ...] = field(default=(), repr=False)  # empty if single-stage

    @property
    def entry(self) -> AttackEntry:
        """Its registry entry."""
        return REGISTRY[self.name]

    @property
    def label(self) -> str:
        """The name with its budget, such as ``pgd-20`` or ``pgd-20x5`` with 5 restarts."""
        entry = self.entry
        if "steps" not in entry.parameters:
            return self.name
        counted = entry.label_budget or self.steps != entry.budget
        label = f"{self.name}-{self.steps}" if counted else self.name
        return label + (f"x{self.restarts}" if self.restarts > 1 else "")

    @property
    def stages(self) -> tuple[AttackSettings, ...]:
        """The stages of the attack, each run on the images that no earlier one fooled."""
        return self.own_stages or (self,)

    @property
    def cost(self) -> int:
        """Maximum passes per image, forward plus backward."""
        if self.own_stages:
            return 1 + sum(stage.cost for stage in self.own_stages)
        return self.algorithm().cost

    @property
    def usual_cost(self) -> int:
        """Maximum passes per image on a model without masked gradients."""
        if self.own_stages:
            return 1 + sum(stage.usual_cost for stage in self.own_stages)
        return self.algorithm().usual_cost

    @property
    def uses_gradient(self) -> bool:
        """Whether it needs a differentiable model."""
        return any(stage.entry.load().uses_gradient for stage in self.stages)

    def classes_needed(self, *, targeted: bool = False) -> int:
        """The fewest classes of a model that it can attack."""
        losses = [stage.entry.options.get("loss_name", "ce") for stage in self.stages]
        return max(classes_needed(loss, targeted=targeted) for loss in losses)

    @property
    def needs_float32(self) -> bool:
        """Whether one of its searches ends right at the decision boundary."""
        return any(stage.entry.load().needs_float32 for stage in self.stages)

    @property
    def takes_target(self) -> bool:
        """Whether it supports a target class."""
        return self.entry.takes_target

    @property
    def fallback(self) -> AttackSettings | None:
        """The attack to try on images that this one has no 8-bit success for, if there is one."""
        if not self.entry.fallback:
            return None
        return resolve_attack(
            self.entry.fallback,
            self.threat_model,
            steps=self.steps,
            restarts=self.restarts,
            seed=self.seed,
        )

    def takes(self, parameter: str) -> bool:
        """Whether it has the parameter `alpha`, `steps` or `restarts`."""
        return parameter in self.entry.parameters

    def to_dict(self) -> dict[str, Any]:
        """Its threat model and parameters as JSON values, without stages."""
        return {
            "norm": self.threat_model.norm,
            "eps": self.threat_model.eps,
            "eps_text": format_eps(self.threat_model.eps),
            "alpha": self.alpha,
            "steps": self.steps,
            "restarts": self.restarts,
            "random_start": self.random_start,
            "seed": self.seed,
        }

    def algorithm(
        self, *, early_stop: bool = True, targeted: bool = False, eight_bit: bool = False
    ) -> Algorithm[Any]:
        """The algorithm that the search runs. Raises ValueError for a multi-stage attack."""
        kind = self.entry.load()
        values: dict[str, Any] = {
            "norm": self.threat_model.norm,
            "steps": self.steps,
            "early_stop": early_stop,
            "targeted": targeted,
            "relative_alpha": relative(self.alpha, self.threat_model.eps),
            "random_start": self.random_start,
            "restarts": self.restarts,
            "targets": self.entry.targets,
            "eight_bit": eight_bit,
        }
        names = {item.name for item in fields(kind) if item.init}
        if not names & {"restarts", "targets"}:  # those are taken in turn within one run
            values["runs"] = self.entry.targets or self.restarts
        known = {name: value for name, value in values.items() if name in names}
        return kind(**known | dict(self.entry.options))

    def run(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        target: Tensor | None = None,
        early_stop: bool = False,
        batch_size: int | None = None,
        cancelled: Cancelled | None = None,
        eight_bit: bool = False,
    ) -> AttackResult:
        """Attack images float32 (N, C, H, W) in [0, 1] with labels int64 (N,), as `pgd` does.

        With `eight_bit` an attack that ends at the decision boundary tries only 8-bit images if it
        can, as rounding its result could undo it; `x` are 8-bit images then.
        `cancelled` returns the mask of cancelled images, see `search`. Also raises ValueError for a
        target that the attack doesn't support.
        """
        if target is not None and not self.takes_target:
            raise ValueError(f"expected an attack that takes a target, got {self.name}")
        if self.own_stages:
            algorithms = [stage.algorithm() for stage in self.own_stages]
            return run_stages(
                model,
                algorithms,
                x,
                y,
                threat_model=self.threat_model,
                seed=self.seed,
                batch_size=batch_size,
                cancelled=cancelled,
            )
        return run_algorithm(
            model,
            self.algorithm(early_stop=early_stop, targeted=target is not None, eight_bit=eight_bit),
            x,
            y,
            threat_model=self.threat_model,
            target=target,
            seed=self.seed,
            batch_size=batch_size,
            cancelled=cancelled,
        )


def resolve_attack(
    name: str,
    threat_model: ThreatModel,
    *,
    alpha: float | None = None,
    steps: int | None = None,
    restarts: int | None = None,
    random_start: bool = True,
    stages: Sequence[str] | None = None,
    seed: int = 0,
) -> AttackSettings:
    """The settings of an attack by name, with defaults; ``pgd-50`` is `pgd` with 50 steps.

    Parameters that the attack does not have are ignored; only PGD has `random_start`. `alpha`
    defaults to a quarter of eps, or more if the steps could not cross the ball. `stages` replaces
    those of a multi-stage attack such as `autoattack`, by name: ``["apgd-ce-10", "square-100"]``.
    Raises ValueError for an unknown attack, for steps or restarts below 1, and for stages of a
    single-stage attack.
    """
    entry, named_steps = parse_name(name)
    takes = entry.parameters
    if steps is None:
        steps = named_steps or entry.budget
    steps = steps if "steps" in takes else entry.budget
    restarts = 1 if restarts is None or "restarts" not in takes else restarts
    check_counts(steps=steps, restarts=restarts)
    kind = entry.load() if entry.algorithm else Algorithm
    if alpha is None or "alpha" not in takes:
        alpha = kind.default_alpha(threat_model.eps, steps)
    if stages is not None and not entry.stages:
        raise ValueError(f"expected an attack of several stages, got {entry.name}")
    return AttackSettings(
        name=entry.name,
        threat_model=threat_model,
        alpha=alpha,
        steps=steps,
        restarts=restarts,
        random_start=entry.random_start and (random_start or not issubclass(kind, PGD)),
        seed=seed,
        own_stages=tuple(
            resolve_attack(stage, threat_model, seed=seed) for stage in stages or entry.stages
        ),
    )


def parse_name(name: str) -> tuple[AttackEntry, int]:
    """The attack of a name such as ``pgd-50``, in any case, and the steps in it, 0 if none.

    Raises UnknownAttack, and ValueError for 0 steps.
    """
    match = re.fullmatch(r"(.+?)(?:-([0-9]{1,6}))?", name.lower())
    base = match[1] if match else name
    entry = REGISTRY.get(ALIASES.get(base, base))
    steps = match[2] if match else None
    if entry is None or (steps is not None and "steps" not in entry.parameters):
        raise UnknownAttack(
            f"expected attack to be one of {', '.join(REGISTRY)} (or pgd-N, with N steps), "
            f"got {name[:40]!r}{did_you_mean(name)}"
        )
    if steps is not None and int(steps) < 1:
        raise ValueError(f"expected at least 1 step, got {name[:40]!r}")
    return entry, int(steps or 0)
