"""Fast adaptive boundary attack: the nearest point another class begins at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robust.attacks.apgd import TARGETS, nth_likeliest
from robust.attacks.call import attack, check_counts
from robust.attacks.frozen import Model
from robust.attacks.result import AttackResult
from robust.attacks.search import Rows
from robust.geometry import Norm, column, distance, lengths
from robust.threat_model import ThreatModel

STEPS = 100
ALPHA_MAX = 0.1  # largest pull back towards the image
ETA = 1.05  # how far a step overshoots the boundary
BETA = 0.9  # how far a point beyond the boundary goes back


def fab_t(
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
    """Step along the linearised boundary to a class, as near to the image as that allows.

    The `targets` likeliest other classes are tried in turn, or all where there are fewer. A point
    counts as soon as it fools the model within eps; without `early_stop` the search goes on to
    the nearest. Arguments, result and errors as those of `pgd`.
    Source: Croce, Hein 2020, arXiv:1907.02044.
    """
    algorithm = FAB(norm=threat_model.norm, steps=steps, runs=targets, early_stop=early_stop)
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
class FAB:
    """`fab_t` between two queries, see `search.Algorithm`.

    A step needs the gradient where it starts, and only the logits where it ends. Where it ends
    short of the boundary the next one starts, so there the gradient is asked for at once; which
    will happen is guessed from the step before.
    """

    norm: Norm
    steps: int = STEPS
    runs: int = TARGETS
    early_stop: bool = True

    ahead = True
    needs_clean = True
    differentiates = True

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, targets=self.runs)

    def begin(self, rows: Rows) -> None:
        rows["target"] = nth_likeliest(rows)
        rows["x_adv"] = rows["x"]
        rows["step"] = torch.zeros_like(rows["y"])
        # Whether x_adv is the end of a step, not yet looked at; and whether to guess it short.
        rows["landed"] = torch.zeros_like(rows["y"], dtype=torch.bool)
        rows["short"] = torch.ones_like(rows["landed"])

    def wants_gradient(self, rows: Rows) -> Tensor:
        return (rows["step"] < self.steps) & (~rows["landed"] | rows["short"])

    def loss(self, logits: Tensor, rows: Rows) -> Tensor:
        pair = torch.stack([rows["y"], rows["target"]], dim=1)
        of_y, of_target = logits.gather(1, pair).unbind(dim=1)
        return of_target - of_y

    def score(self, rows: Rows, logits: Tensor, loss: Tensor) -> Tensor:
        """The nearer the better, and none beyond eps."""
        away = distance(rows["x_adv"], rows["x"], self.norm)
        return torch.where(away <= rows["eps"].flatten(), -away, -torch.inf)

    def guess(self, rows: Rows, most: int) -> list[Tensor]:
        return []

    def advance(self, rows: Rows, logits: Tensor, loss: Tensor, gradient: Tensor | None) -> Tensor:
        x_adv, landed = rows["x_adv"], rows["landed"]
        beyond = landed & (logits.argmax(dim=1) != rows["y"])
        spent = landed & (rows["step"] >= self.steps)
        back = torch.lerp(rows["x"], x_adv, BETA)
        rows["x_adv"] = torch.where(column(beyond), back, x_adv)
        rows["short"] = torch.where(landed, ~beyond, rows["short"])
        if gradient is None:
            rows["landed"] = torch.zeros_like(landed)
            return spent
        goes = ~beyond & ~spent
        stepped = self._step(rows, x_adv, loss, gradient)
        rows["x_adv"] = torch.where(column(goes), stepped, rows["x_adv"])
        rows["step"] = rows["step"] + goes
        rows["landed"] = goes
        return spent

    def _step(self, rows: Rows, x_adv: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        """Past the hyperplane that stands for the boundary, leaning towards the image."""
        x = rows["x"]
        gap = -loss  # what the linear model says is lacking at x_adv, and at x:
        so_far = torch.linalg.vecdot(gradient.flatten(1), (x_adv - x).flatten(1))
        step_from = hyperplane(gradient, self.norm)
        from_here, from_x = step_from(x_adv, gap), step_from(x, gap + so_far)
        near = lengths(from_here, self.norm).clamp_min(1e-8)
        far = lengths(from_x, self.norm).clamp_min(1e-8)
        share = (near / (near + far)).clamp_max(ALPHA_MAX)
        ahead = torch.add(x_adv, from_here, alpha=ETA)
        return ahead.lerp_(torch.add(x, from_x, alpha=ETA), share).clamp_(0, 1)


def to_hyperplane(x: Tensor, w: Tensor, gap: Tensor, norm: Norm) -> Tensor:
    """The smallest d in `norm` with <w, d> = gap and x + d in [0, 1]; all of the box if none has.

    `x` and `w` float32 (N, C, H, W), `gap` float32 (N,).
    """
    return hyperplane(w, norm)(x, gap)


def hyperplane(w: Tensor, norm: Norm) -> Callable[[Tensor, Tensor], Tensor]:
    """`to_hyperplane` for one `w` and more than one `x` and `gap`.

    Each pixel moves by t in `linf`, by t * w in `l2`, until its room is used up. What that yields
    is concave in t and linear between the limits of the pixels, so that Newton's method from
    t = 0 never overshoots and ends soon.
    """
    largest = lengths(w, "linf").clamp_min(1e-30)  # else squares could underflow
    scaled = (w / largest).flatten(1)
    weight, sign, end = scaled.abs(), scaled.sign(), (scaled > 0).float()
    yields = weight if norm == "linf" else weight.square()

    def step_from(x: Tensor, gap: Tensor) -> Tensor:
        want, other_end = gap.abs() / largest.flatten(), (gap < 0).float().unsqueeze(1)
        room = (end - other_end).abs_().sub_(x.flatten(1)).abs_()
        limit = room if norm == "linf" else room / weight.clamp_min(1e-30)
        t, lacking = torch.zeros_like(want), want
        for _ in range(50):
            slope = torch.linalg.vecdot(yields, (limit > t.unsqueeze(1)).float())
            short = lacking > 1e-6 * want
            if not bool((short & (slope > 0)).any()):
                break
            t = t + torch.where(short & (slope > 0), lacking / slope, 0.0)
            lacking = want - torch.linalg.vecdot(yields, torch.minimum(limit, t.unsqueeze(1)))
        moved = t.unsqueeze(1) if norm == "linf" else t.unsqueeze(1) * weight
        moved = torch.minimum(moved, room).mul_(sign).mul_(gap.sign().unsqueeze(1))
        return moved.view_as(w)

    return step_from
