"""Auto-PGD: projected gradient descent that finds its own step length."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from robust.attacks.call import attack, check_counts
from robust.attacks.frozen import Model
from robust.attacks.losses import FUNCTIONS, Loss, check_loss, classes_needed
from robust.attacks.noise import normal, uniform
from robust.attacks.result import AttackResult
from robust.attacks.search import Rows
from robust.geometry import Norm, column, lengths, projection, steepest
from robust.threat_model import ThreatModel

STEPS = 100
TARGETS = 9
RHO = 0.75  # share of steps that must raise the loss for the step length to stay
MOMENTUM = 0.75


def apgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat_model: ThreatModel,
    loss: Loss = "ce",
    steps: int = STEPS,
    restarts: int = 1,
    early_stop: bool = True,
    target: Tensor | None = None,
    eps: Tensor | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> AttackResult:
    """Auto-PGD on the cross-entropy (`ce`) or the difference of logits ratio (`dlr`).

    Arguments, result and errors as those of `pgd`. Raises ValueError also where the model has too
    few classes for the loss. Source: Croce, Hein 2020, arXiv:2003.01690.
    """
    algorithm = APGD(
        norm=threat_model.norm,
        steps=steps,
        runs=restarts,
        early_stop=early_stop,
        loss_name=loss,
        targeted=target is not None,
    )
    return attack(
        model,
        algorithm,
        x,
        y,
        threat_model=threat_model,
        eps=eps,
        target=target,
        seed=seed,
        batch_size=batch_size,
    )


def apgd_t(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat_model: ThreatModel,
    targets: int = TARGETS,
    steps: int = STEPS,
    early_stop: bool = True,
    eps: Tensor | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> AttackResult:
    """Auto-PGD on the targeted difference of logits ratio, class after class.

    The `targets` classes the model finds likeliest after the first are tried in turn, each with
    `steps` steps, until one fools it (any wrong class counts). Where the model has no more than
    `targets` classes all others are tried; with 3 classes or fewer the targeted margin takes the
    place of the ratio, which needs 4. Source: Croce, Hein 2020, arXiv:2003.01690.
    """
    algorithm = APGD(
        norm=threat_model.norm,
        steps=steps,
        runs=targets,
        early_stop=early_stop,
        loss_name="dlr",
        to_likeliest=True,
    )
    return attack(
        model,
        algorithm,
        x,
        y,
        threat_model=threat_model,
        eps=eps,
        seed=seed,
        batch_size=batch_size,
    )


@dataclass(frozen=True, kw_only=True)
class APGD:
    """`apgd` and `apgd_t` between two queries, see `search.Algorithm`."""

    norm: Norm
    steps: int = STEPS
    runs: int = 1
    early_stop: bool = True
    loss_name: Loss = "ce"
    targeted: bool = False
    to_likeliest: bool = False  # each run leads to another class, likeliest first

    differentiates = True

    def __post_init__(self) -> None:
        check_counts(
            steps=self.steps, **{"targets" if self.to_likeliest else "restarts": self.runs}
        )
        check_loss(self.loss_name)

    @property
    def ahead(self) -> bool:
        return self.to_likeliest

    @property
    def needs_clean(self) -> bool:
        return self.to_likeliest

    def begin(self, rows: Rows) -> None:
        x, zeros = rows["x"], torch.zeros_like(rows["y"])
        if self.to_likeliest:
            rows["target"] = nth_likeliest(rows)
        rows["x_adv"] = rows["x_old"] = rows["x_top"] = self.start(rows)
        rows["step"], rows["rises"] = zeros, zeros
        rows["size"] = 2 * rows["eps"]
        rows["g_top"] = torch.zeros_like(x)
        rows["loss_old"] = torch.zeros_like(rows["eps"].flatten())
        rows["loss_top"] = rows["loss_checked"] = torch.full_like(rows["loss_old"], -torch.inf)
        rows["halved"] = torch.ones_like(zeros, dtype=torch.bool)

    def start(self, rows: Rows) -> Tensor:
        """A point on the surface of the ball, cut by [0, 1]."""
        x = rows["x"]
        draw = _symmetric if self.norm == "linf" else normal
        offset = draw(rows["key"], rows["run"], x[0].numel()).view_as(x)
        return (x + rows["eps"] * offset / lengths(offset, self.norm)).clamp(0, 1)

    def wants_gradient(self, rows: Rows) -> Tensor:
        return rows["step"] < self.steps

    def loss(self, logits: Tensor, rows: Rows) -> Tensor:
        targeted = self.targeted or self.to_likeliest
        name, needed = self.loss_name, classes_needed(self.loss_name, targeted=targeted)
        if logits.shape[1] < needed:
            if not self.to_likeliest:
                raise ValueError(
                    f"expected at least {needed} classes for the loss {name}, "
                    f"got {logits.shape[1]}; use ce or margin"
                )
            name = "margin"
        return FUNCTIONS[name](logits, rows["y"], rows["target"] if targeted else None)

    def score(self, rows: Rows, logits: Tensor, loss: Tensor) -> Tensor:
        return loss

    def guess(self, rows: Rows, most: int) -> list[Tensor]:
        return []

    def advance(self, rows: Rows, logits: Tensor, loss: Tensor, gradient: Tensor | None) -> Tensor:
        if gradient is None:
            return torch.ones_like(rows["fooled"])
        x_adv = rows["x_adv"]
        rows["rises"] = rows["rises"] + (loss > rows["loss_old"])
        first = rows["step"] == 0
        # The reference counts the first step as a rise where its loss is above 0.
        rows["rises"] = torch.where(first, 0, rows["rises"])
        rows["loss_old"] = torch.where(first, 0.0, loss)
        top = loss > rows["loss_top"]
        rows["x_top"] = torch.where(column(top), x_adv, rows["x_top"])
        rows["g_top"] = torch.where(column(top), gradient, rows["g_top"])
        rows["loss_top"] = torch.where(top, loss, rows["loss_top"])
        rows["loss_checked"] = torch.where(first, loss, rows["loss_checked"])
        x_adv, gradient = self._check(rows, x_adv, gradient)
        rows["x_adv"] = self._move(rows, x_adv, gradient)
        rows["x_old"] = x_adv
        rows["step"] = rows["step"] + 1
        return torch.zeros_like(rows["fooled"])

    def _check(self, rows: Rows, x_adv: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Where the step is too long, halve it and go back to the best point."""
        window = _windows(self.steps, x_adv.device)[rows["step"]]
        due = window > 0
        if not bool(due.any()):
            return x_adv, gradient
        stuck = ~rows["halved"] & (rows["loss_checked"] >= rows["loss_top"])
        halve = due & ((rows["rises"] <= RHO * window) | stuck)
        rows["halved"] = torch.where(due, halve, rows["halved"])
        rows["loss_checked"] = torch.where(due, rows["loss_top"], rows["loss_checked"])
        rows["rises"] = torch.where(due, 0, rows["rises"])
        back = column(halve)
        rows["size"] = torch.where(back, rows["size"] / 2, rows["size"])
        return torch.where(back, rows["x_top"], x_adv), torch.where(back, rows["g_top"], gradient)

    def _move(self, rows: Rows, x_adv: Tensor, gradient: Tensor) -> Tensor:
        x, eps, old = rows["x"], rows["eps"], rows["x_old"]
        inside = projection(x, norm=self.norm, eps=eps)
        share = torch.where(column(rows["step"] == 0), 1.0, MOMENTUM)
        ahead = inside(steepest(gradient, self.norm).mul_(rows["size"]).add_(x_adv))
        moved = ahead.sub_(x_adv).mul_(share).add_(x_adv)
        return inside(moved.add_((x_adv - old).mul_(1 - share)))


def nth_likeliest(rows: Rows) -> Tensor:
    """The class each run leads to, int64 (N,): of those that are not `y` the likeliest first."""
    others = rows["clean"].scatter(1, rows["y"].unsqueeze(1), -torch.inf)
    order = others.argsort(dim=1, descending=True)
    return order.gather(1, rows["run"].unsqueeze(1)).squeeze(1)


def _symmetric(keys: Tensor, stream: Tensor | int, count: int) -> Tensor:
    return 2 * uniform(keys, stream, count) - 1


def checks(steps: int) -> dict[int, int]:
    """Steps after which the step length is looked at, with the steps since the last look."""
    window, least = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1)
    shrink, at, found = max(int(0.03 * steps), 1), 0, {}
    while at + window <= steps:
        at += window
        found[at] = window
        window = max(window - shrink, least)
    return found


@cache
def _windows(steps: int, device: torch.device) -> Tensor:
    """Of each step the window that ends with it, or 0, int64 (steps + 1,)."""
    found = checks(steps)
    return torch.tensor([found.get(step, 0) for step in range(steps + 1)], device=device)
