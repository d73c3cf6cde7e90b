"""Projected gradient descent and, as its single step, the fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust.attacks.call import attack, check_counts
from robust.attacks.frozen import Model
from robust.attacks.losses import FUNCTIONS, Loss, check_loss
from robust.attacks.noise import normal, uniform
from robust.attacks.result import AttackResult
from robust.attacks.search import Rows
from robust.geometry import Norm, column, lengths, project, steepest
from robust.threat_model import ThreatModel


def fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat_model: ThreatModel,
    target: Tensor | None = None,
    eps: Tensor | None = None,
) -> AttackResult:
    """One step of length eps along the gradient.

    Images float32 (N, C, H, W) in [0, 1], labels and targets int64 (N,). For `linf` this is the
    fast gradient sign method; for `l2` the step follows the gradient itself. Raises ValueError
    as `pgd` does. Source: Goodfellow et al. 2015, arXiv:1412.6572.
    """
    algorithm = PGD(
        norm=threat_model.norm,
        step=1.0,
        steps=1,
        random_start=False,
        early_stop=False,
        targeted=target is not None,
    )
    return attack(model, algorithm, x, y, threat_model=threat_model, eps=eps, target=target)


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat_model: ThreatModel,
    alpha: float,
    steps: int,
    restarts: int = 1,
    random_start: bool = True,
    early_stop: bool = False,
    loss: Loss = "ce",
    target: Tensor | None = None,
    eps: Tensor | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> AttackResult:
    """Climb `loss` in `steps` steps of length `alpha`, each pulled back into the ball.

    Images float32 (N, C, H, W) in [0, 1], labels int64 (N,), `alpha` in pixel units. With `target`
    int64 (N,) the loss towards that class is descended instead. `eps` float32 (N,) gives each
    image a radius of its own, and an `alpha` in proportion. Every iterate is scored, the last
    included, and of those that fool the model (or else of all) the one of the highest loss is
    kept. Restarts go on with the images not yet fooled; with `early_stop` a fooled image leaves
    at once and `x_adv` is its first success. Starts depend on `seed` and the image alone; without
    `random_start` the first run begins at the image. Raises ValueError for images, labels or
    settings out of range.
    Source: Madry et al. 2018, arXiv:1706.06083.
    """
    if eps is not None and not threat_model.eps:
        raise ValueError(
            "expected a threat model with an eps that alpha is in proportion to, got 0"
        )
    algorithm = PGD(
        norm=threat_model.norm,
        step=relative(alpha, threat_model.eps),
        steps=steps,
        runs=restarts,
        random_start=random_start,
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


def relative(alpha: float, eps: float) -> float:
    """A step length as a share of eps, so that each image can have its own eps."""
    return alpha / eps if eps else 0.0


@dataclass(frozen=True, kw_only=True)
class PGD:
    """`pgd` between two queries, see `search.Algorithm`. `step` is a share of eps."""

    norm: Norm
    step: float
    steps: int
    runs: int = 1
    random_start: bool = True  # False: the first run begins at the image
    early_stop: bool = True
    loss_name: Loss = "ce"
    targeted: bool = False

    ahead = False
    needs_clean = False
    differentiates = True

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, restarts=self.runs)
        check_loss(self.loss_name)
        if not self.step >= 0:
            raise ValueError(f"expected alpha of at least 0, got {self.step:g} times eps")

    def begin(self, rows: Rows) -> None:
        x = rows["x"]
        rows["step"] = torch.zeros_like(rows["y"])
        rows["x_adv"] = x
        if self.random_start or self.runs > 1:
            begin = self._start(rows)
            moved = column((rows["run"] > 0) | self.random_start)
            rows["x_adv"] = torch.where(moved, begin, x)

    def _start(self, rows: Rows) -> Tensor:
        x, keys, runs = rows["x"], rows["key"], rows["run"]
        count = x[0].numel()
        if self.norm == "linf":
            offset = (2 * uniform(keys, runs, count) - 1).view_as(x)
        else:  # uniform in volume
            direction = normal(keys, 2 * runs, count).view_as(x)
            radius = uniform(keys, 2 * runs + 1, 1).view(-1, 1, 1, 1) ** (1 / count)
            offset = radius * direction / lengths(direction)
        return project(x + rows["eps"] * offset, x, norm=self.norm, eps=rows["eps"])

    def wants_gradient(self, rows: Rows) -> Tensor:
        return rows["step"] < self.steps

    def loss(self, logits: Tensor, rows: Rows) -> Tensor:
        target = rows["target"] if self.targeted else None
        return FUNCTIONS[self.loss_name](logits, rows["y"], target)

    def score(self, rows: Rows, logits: Tensor, loss: Tensor) -> Tensor:
        return loss

    def guess(self, rows: Rows, most: int) -> list[Tensor]:
        return []

    def advance(self, rows: Rows, logits: Tensor, loss: Tensor, gradient: Tensor | None) -> Tensor:
        if gradient is None:
            return torch.ones_like(rows["fooled"])
        x_adv = rows["x_adv"] + self.step * rows["eps"] * steepest(gradient, self.norm)
        rows["x_adv"] = project(x_adv, rows["x"], norm=self.norm, eps=rows["eps"])
        rows["step"] = rows["step"] + 1
        return torch.zeros_like(rows["fooled"])
