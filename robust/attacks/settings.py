"""Attacks by name, with the parameters people leave out filled in."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robust.attacks.apgd import APGD, TARGETS
from robust.attacks.apgd import STEPS as APGD_STEPS
from robust.attacks.call import attack, check_counts, check_inputs
from robust.attacks.fab import FAB
from robust.attacks.fab import STEPS as FAB_STEPS
from robust.attacks.frozen import Model, frozen
from robust.attacks.minimal import ROUNDS, minimal
from robust.attacks.passes import Passes, check_classes
from robust.attacks.pgd import PGD, relative
from robust.attacks.result import AttackResult
from robust.attacks.search import Algorithm, GivenUp, of_rows
from robust.attacks.square import QUERIES, Square
from robust.threat_model import Norm, ThreatModel

# The name of each attack with its usual steps, or queries; None where it takes none.
_STEPS = {
    "fgsm": None,
    "pgd": 20,
    "pgd-margin": 20,
    "apgd-ce": APGD_STEPS,
    "apgd-dlr": APGD_STEPS,
    "apgd-t": APGD_STEPS,
    "fab-t": FAB_STEPS,
    "square": QUERIES,
    "autoattack": None,
    "minimal": 20,
}
ATTACKS = tuple(_STEPS)
AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")  # each on the survivors of those before
DEFAULT_ATTACKS = ("fgsm", "pgd")
DEFAULT_EPS: dict[Norm, float] = {"linf": 8 / 255, "l2": 0.5}  # pixel units
_ALIASES = {"apgd": "apgd-ce"}
_ALWAYS_COUNTED = ("pgd", "pgd-margin")  # whose label names the steps, usual or not


@dataclass(frozen=True, kw_only=True)
class AttackSettings:
    """An attack with every parameter resolved. Sizes are in pixel units."""

    name: str
    threat_model: ThreatModel
    alpha: float  # 0 where the attack has no fixed step
    steps: int  # of `square`: queries
    restarts: int
    random_start: bool
    seed: int

    @property
    def label(self) -> str:
        """The name with its budget, such as ``pgd-20`` or ``pgd-20x5`` with 5 restarts."""
        usual = _STEPS[self.name]
        if usual is None:
            return self.name
        counted = self.name in _ALWAYS_COUNTED or self.steps != usual
        label = f"{self.name}-{self.steps}" if counted else self.name
        return label + (f"x{self.restarts}" if self.restarts > 1 else "")

    @property
    def cost(self) -> int:
        """Most forward and backward passes an image can take, counted alike."""
        if self.name == "autoattack":
            return 1 + sum(stage.cost for stage in self.stages)
        if self.name == "square":
            return self.restarts * (self.steps + 1)
        if self.name == "fab-t":
            return 1 + TARGETS * (3 * self.steps + 1)
        if self.name == "minimal":
            return (1 + ROUNDS) * self.restarts * (2 * self.steps + 1)
        runs = TARGETS if self.name == "apgd-t" else self.restarts
        return runs * (2 * self.steps + 1) + (self.name == "apgd-t")

    @property
    def stages(self) -> tuple[AttackSettings, ...]:
        """The attacks this one is made of, each run on what the ones before left standing."""
        if self.name != "autoattack":
            return (self,)
        return tuple(resolve_attack(name, self.threat_model, seed=self.seed) for name in AUTOATTACK)

    @property
    def takes_target(self) -> bool:
        """Whether it can lead to a class that is asked for."""
        return self.name not in ("apgd-t", "fab-t", "autoattack")

    def takes(self, parameter: str) -> bool:
        """Whether `alpha`, `steps` or `restarts` means anything to it."""
        if parameter == "alpha":
            return self.name in ("pgd", "pgd-margin")
        if parameter == "restarts" and self.name in ("apgd-t", "fab-t"):
            return False
        return _STEPS[self.name] is not None

    def algorithm(self, *, early_stop: bool = True, targeted: bool = False) -> Algorithm:
        """What the search runs. Raises ValueError for `autoattack` and `minimal`: they are more."""
        norm, stop, steps, runs = self.threat_model.norm, early_stop, self.steps, self.restarts
        if self.name in ("fgsm", "pgd", "pgd-margin"):
            return PGD(
                norm=norm,
                step=relative(self.alpha, self.threat_model.eps),
                steps=steps,
                runs=runs,
                random_start=self.random_start,
                early_stop=stop,
                loss_name="margin" if self.name == "pgd-margin" else "ce",
                targeted=targeted,
            )
        if self.name in ("apgd-ce", "apgd-dlr"):
            return APGD(
                norm=norm,
                steps=steps,
                runs=runs,
                early_stop=stop,
                loss_name="ce" if self.name == "apgd-ce" else "dlr",
                targeted=targeted,
            )
        if self.name == "apgd-t":
            return APGD(
                norm=norm,
                steps=steps,
                runs=TARGETS,
                early_stop=stop,
                loss_name="dlr",
                to_likeliest=True,
            )
        if self.name == "fab-t":
            return FAB(norm=norm, steps=steps, early_stop=stop)
        if self.name == "square":
            return Square(norm=norm, queries=steps, runs=runs, early_stop=stop, targeted=targeted)
        raise ValueError(f"expected an attack of one search, got {self.name}")

    def run(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        target: Tensor | None = None,
        early_stop: bool = False,
        batch_size: int | None = None,
        given_up: GivenUp | None = None,
    ) -> AttackResult:
        """Attack images float32 (N, C, H, W) in [0, 1] with labels int64 (N,), as `pgd` says.

        `given_up` tells, on the CPU, which images may leave early, see `search`. Raises ValueError
        also for a target where the attack takes none.
        """
        if target is not None and not self.takes_target:
            raise ValueError(f"expected an attack that takes a target, got {self.name}")
        if self.name == "minimal":
            return minimal(
                model,
                x,
                y,
                threat_model=self.threat_model,
                steps=self.steps,
                restarts=self.restarts,
                target=target,
                seed=self.seed,
                batch_size=batch_size,
                given_up=given_up,
            )
        if len(self.stages) == 1:
            return attack(
                model,
                self.algorithm(early_stop=early_stop, targeted=target is not None),
                x,
                y,
                threat_model=self.threat_model,
                target=target,
                seed=self.seed,
                batch_size=batch_size,
                given_up=given_up,
            )
        check_inputs(x, y)
        result = _clean(model, x, y, batch_size)
        for number, stage in enumerate(self.stages):
            done = result.success
            if given_up is not None:
                done = done | given_up().to(x.device)
            left = (~done).nonzero().squeeze(1)
            if len(left):
                more = stage.run(
                    model,
                    x[left],
                    y[left],
                    early_stop=True,
                    batch_size=batch_size,
                    given_up=of_rows(given_up, left),
                )
                result = _merge(result, more, left, also_failed=not number)
        return result


def _clean(model: Model, x: Tensor, y: Tensor, batch_size: int | None) -> AttackResult:
    """What there is before any attack: an image that is wrong as it is needs none."""
    passes = Passes(model)
    with frozen(model, x.device):
        parts = torch.split(x.float(), batch_size or len(x))
        logits = torch.cat([passes.logits(part) for part in parts])
    check_classes(logits.shape[1], y)
    nothing = torch.zeros_like(y)
    return AttackResult(
        x_adv=x.float(),
        logits=logits,
        success=logits.argmax(dim=1) != y,
        distance=nothing.float(),
        forwards=nothing + 1,
        backwards=nothing,
    )


def _merge(
    result: AttackResult, more: AttackResult, rows: Tensor, *, also_failed: bool
) -> AttackResult:
    """`result` with what a further attack on its `rows` added."""
    took = more.success | also_failed

    def put(name: str) -> Tensor:
        values: Tensor = getattr(result, name).clone()
        values[rows[took]] = getattr(more, name)[took]
        return values

    changed = {name: put(name) for name in ("x_adv", "logits", "success", "distance")}
    return replace(
        result,
        **changed,
        forwards=result.forwards.index_add(0, rows, more.forwards),
        backwards=result.backwards.index_add(0, rows, more.backwards),
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

    `alpha` is for the kinds of `pgd`: by default a quarter of eps, more where so few steps could
    not cross the ball. `fgsm` and `autoattack` take none of the parameters and leave them unused.
    Raises ValueError for an unknown attack, or steps and restarts below 1.
    """
    base, counted = _parse(name)
    eps, usual = threat_model.eps, _STEPS[base]
    if usual is None:
        return AttackSettings(
            name=base,
            threat_model=threat_model,
            alpha=eps if base == "fgsm" else 0.0,
            steps=1 if base == "fgsm" else APGD_STEPS,
            restarts=1,
            random_start=base != "fgsm",
            seed=seed,
        )
    if steps is None:
        steps = counted or usual
    restarts = 1 if restarts is None or base in ("apgd-t", "fab-t") else restarts
    check_counts(steps=steps, restarts=restarts)
    if base not in ("pgd", "pgd-margin"):
        alpha = 2 * eps if base.startswith("apgd") else 0.0
    elif alpha is None:
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


def _parse(name: str) -> tuple[str, int]:
    """The attack a name means, and the steps it names, or 0."""
    match = re.fullmatch(r"(.+?)(?:-([0-9]{1,6}))?", name)
    base = match[1] if match else name
    base = _ALIASES.get(base, base)
    if match is None or base not in _STEPS or (_STEPS[base] is None and match[2]):
        raise ValueError(
            f"expected an attack out of {', '.join(ATTACKS)} (or pgd-N, with N steps), "
            f"got {name[:40]!r}"
        )
    if match[2] is None:
        return base, 0
    if int(match[2]) < 1:
        raise ValueError(f"expected at least 1 step, got {name[:40]!r}")
    return base, int(match[2])
