"""The registry of attacks: names, parameters and implementations.

The command line, the service, the playground, labels, flags and docs read this table, so an attack
is one file in `robust/attacks/` and one entry here. It imports neither torch nor the attacks, so
that help is fast. ``python -m robust.attack_registry`` prints the table of docs/attacks.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    from robust.attacks.algorithm import Algorithm

Parameter = Literal["alpha", "steps", "restarts"]
TARGETS = 9  # target classes that a targeted stage of AutoAttack tries


@dataclass(frozen=True, kw_only=True)
class AttackEntry:
    """One attack, run by its `algorithm` or, if it has `stages`, by the attacks named there."""

    name: str  # as on the command line
    summary: str  # one line
    title: str = ""  # as in a sentence; the name in capitals if empty
    algorithm: str = ""  # `module:Class` within `robust.attacks`, an `Algorithm`
    options: Mapping[str, Any] = field(default_factory=dict)  # arguments of that class
    stages: tuple[str, ...] = ()  # each runs on the images that no earlier one fooled
    budget: int  # default steps, or queries
    unit: Literal["steps", "queries"] = "steps"
    parameters: tuple[Parameter, ...] = ("steps", "restarts")  # those that the user can set
    takes_target: bool = True  # whether it supports a target class
    targets: int = 0  # number of target classes that it chooses and tries in turn
    random_start: bool = True  # False: the first restart starts at the image
    label_budget: bool = False  # whether its label includes the budget even if it is the default
    fallback: str = ""  # attack on the images without an 8-bit success, with the same budget

    @property
    def default_budget(self) -> str:
        """Its default budget, such as ``20 steps``; empty for a multi-stage attack."""
        if self.stages:
            return ""
        return f"{self.budget} {self.unit if self.budget > 1 else 'step'}"

    @property
    def described(self) -> str:
        """Its summary and default budget, as one line of help."""
        return f"{self.summary} ({self.default_budget})" if self.default_budget else self.summary

    def load(self) -> type[Algorithm[Any]]:
        """Import the class that runs it. Raises ValueError for a multi-stage attack."""
        if not self.algorithm:
            raise ValueError(f"expected an attack of one search, got {self.name}")
        module, name = self.algorithm.split(":")
        loaded: type[Algorithm[Any]] = getattr(import_module(f"robust.attacks.{module}"), name)
        return loaded


_PGD: tuple[Parameter, ...] = ("alpha", "steps", "restarts")

REGISTRY: dict[str, AttackEntry] = {
    entry.name: entry
    for entry in (
        AttackEntry(
            name="fgsm",
            summary="one step of length eps along the sign of the gradient",
            algorithm="pgd:PGD",
            budget=1,
            parameters=(),
            random_start=False,
        ),
        AttackEntry(
            name="pgd",
            summary="projected gradient descent on the cross-entropy",
            algorithm="pgd:PGD",
            budget=20,
            parameters=_PGD,
            label_budget=True,
        ),
        AttackEntry(
            name="pgd-margin",
            title="PGD margin",
            summary="projected gradient descent on the margin of the logits",
            algorithm="pgd:PGD",
            options={"loss_name": "margin"},
            budget=20,
            parameters=_PGD,
            label_budget=True,
        ),
        AttackEntry(
            name="apgd-ce",
            summary="Auto-PGD (adaptive step size) on the cross-entropy",
            algorithm="apgd:APGD",
            options={"loss_name": "ce"},
            budget=100,
        ),
        AttackEntry(
            name="apgd-dlr",
            summary="Auto-PGD on the difference of logits ratio",
            algorithm="apgd:APGD",
            options={"loss_name": "dlr"},
            budget=100,
        ),
        AttackEntry(
            name="apgd-t",
            summary="Auto-PGD on the targeted ratio, to the 9 likeliest other classes in turn",
            algorithm="apgd:TargetedAPGD",
            budget=100,
            parameters=("steps",),
            takes_target=False,
            targets=TARGETS,
        ),
        AttackEntry(
            name="fab-t",
            summary="the closest point on the decision boundary with each of those 9 classes",
            algorithm="fab:FAB",
            budget=100,
            parameters=("steps",),
            takes_target=False,
            targets=TARGETS,
            random_start=False,
        ),
        AttackEntry(
            name="square",
            title="Square",
            summary="random search that sees only the logits",
            algorithm="square:Square",
            budget=5000,
            unit="queries",
        ),
        AttackEntry(
            name="square-check",
            title="Square check",
            summary="square, stopped early where 9 gradient steps beat its first 100 queries",
            algorithm="square_check:SquareCheck",
            budget=5000,
            unit="queries",
        ),
        AttackEntry(
            name="malt",
            summary="Auto-PGD to the 3 classes that are closest by linear extrapolation",
            algorithm="malt:MALT",
            budget=100,
            parameters=("steps",),
            takes_target=False,
            targets=3,
        ),
        AttackEntry(
            name="pma",
            summary="Auto-PGD on the margin of the probabilities",
            algorithm="apgd:APGD",
            options={"loss_name": "pm"},
            budget=100,
        ),
        AttackEntry(
            name="autoattack",
            title="AutoAttack",
            summary="the standard protocol: apgd-ce, apgd-t, fab-t and square in turn",
            stages=("apgd-ce", "apgd-t", "fab-t", "square"),
            budget=100,
            parameters=(),
            takes_target=False,
        ),
        AttackEntry(
            name="audit",
            title="Audit",
            summary="like autoattack in a tenth of the passes: pma-10, malt, square-check in turn",
            stages=("pma-10", "malt", "square-check"),
            budget=100,
            parameters=(),
            takes_target=False,
        ),
        AttackEntry(
            name="minimal",
            title="Minimal",
            summary="the smallest eps that fools each image, by bisection up to the given eps",
            algorithm="minimal:Minimal",
            budget=20,
            random_start=False,
            fallback="pgd",
        ),
    )
}
ALIASES = {"apgd": "apgd-ce"}
_ABBREVIATIONS = {"aa": "autoattack"}  # too far from the name to be found by its letters
DEFAULT_ATTACKS = ("fgsm", "pgd")


def did_you_mean(name: str) -> str:
    """``; did you mean pgd-20?`` for a name close to that of an attack, otherwise empty."""
    match = re.fullmatch(r"(.*?)[-_ ]?([0-9]{0,6})", name[:40].lower(), re.DOTALL)
    assert match is not None
    close = get_close_matches(match[1], [*REGISTRY, *ALIASES, *_ABBREVIATIONS], n=1)
    if not close:
        return ""
    meant = _ABBREVIATIONS.get(close[0], close[0])
    takes_steps = "steps" in REGISTRY[ALIASES.get(meant, meant)].parameters
    return f"; did you mean {meant}{f'-{match[2]}' if match[2] and takes_steps else ''}?"


def names(which: Callable[[AttackEntry], bool]) -> str:
    """The names of the attacks that `which` selects, as text: ``fgsm, pgd and square``."""
    return _joined([entry.name for entry in REGISTRY.values() if which(entry)])


def takers(parameter: Parameter) -> str:
    """The names of the attacks with this parameter, as text."""
    return names(lambda entry: parameter in entry.parameters)


def default_budgets() -> str:
    """The default steps or queries of the attacks that take them, as text."""
    by_budget: dict[int, list[str]] = {}
    for entry in REGISTRY.values():
        if "steps" in entry.parameters:
            by_budget.setdefault(entry.budget, []).append(entry.name)
    return "; ".join(f"{budget} for {_joined(found)}" for budget, found in by_budget.items())


def markdown_table() -> str:
    """All attacks as a Markdown table."""
    rows = [("`--attack`", "what it does", "default", "also takes"), ("---",) * 4]
    for entry in REGISTRY.values():
        takes = [*entry.parameters, *(["target"] if entry.takes_target else [])]
        row = (f"`{entry.name}`", entry.summary, entry.default_budget, ", ".join(takes))
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _joined(found: Sequence[str]) -> str:
    return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)


if __name__ == "__main__":
    click.echo(markdown_table())
