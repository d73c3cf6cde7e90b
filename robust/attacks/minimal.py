"""The smallest eps that fools a model, image by image."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from robust.attacks.call import attack, check_counts, check_inputs, sizes_of
from robust.attacks.frozen import Model
from robust.attacks.pgd import PGD
from robust.attacks.result import AttackResult
from robust.attacks.search import GivenUp, of_rows
from robust.threat_model import ThreatModel

ROUNDS = 10  # of bisection: eps to a thousandth of the largest
STEP = 0.25  # of the radius


def minimal(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat_model: ThreatModel,
    steps: int = 20,
    restarts: int = 1,
    rounds: int = ROUNDS,
    target: Tensor | None = None,
    eps: Tensor | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    given_up: GivenUp | None = None,
) -> AttackResult:
    """Bisect the radius at which PGD on the margin fools the model, up to eps.

    Arguments and errors as those of `pgd`. `distance` is how far the nearest adversarial image
    found lies, an upper bound of the smallest eps; where `success` is False there was none
    within eps. An image that is wrong as it is has distance 0.
    """
    check_inputs(x, y, target)
    check_counts(steps=steps)
    if rounds < 0:
        raise ValueError(f"expected rounds as a whole number of at least 0, got {rounds}")
    algorithm = PGD(
        norm=threat_model.norm,
        step=min(1.0, max(STEP, 2.5 / steps)),
        steps=steps,
        runs=restarts,
        loss_name="margin",
        targeted=target is not None,
        random_start=False,  # further restarts begin at random
    )
    sizes = sizes_of(eps, threat_model, x)

    def try_at(radius: Tensor, rows: Tensor) -> AttackResult:
        return attack(
            model,
            algorithm,
            x[rows],
            y[rows],
            threat_model=threat_model,
            eps=radius[rows],
            target=None if target is None else target[rows],
            seed=seed,
            batch_size=batch_size,
            given_up=of_rows(given_up, rows),
        )

    everything = torch.arange(len(x), device=x.device)
    best = try_at(sizes, everything)
    low, high = torch.zeros_like(sizes), best.distance
    for _ in range(rounds):
        going_on = best.success & (high > low)
        if given_up is not None:
            going_on = going_on & ~given_up().to(x.device)
        rows = going_on.nonzero().squeeze(1)
        if not len(rows):
            break
        middle = (low + high) / 2
        found = try_at(middle, rows)
        best = _nearer(best, found, rows)
        low[rows] = torch.where(found.success, low[rows], middle[rows])
        high = best.distance
    return best


def _nearer(best: AttackResult, found: AttackResult, rows: Tensor) -> AttackResult:
    nearer = found.success & (found.distance < best.distance[rows])
    changed, took = rows[nearer], nearer
    x_adv, logits = best.x_adv.clone(), best.logits.clone()
    distance = best.distance.clone()
    x_adv[changed], logits[changed] = found.x_adv[took], found.logits[took]
    distance[changed] = found.distance[took]
    return replace(
        best,
        x_adv=x_adv,
        logits=logits,
        distance=distance,
        forwards=best.forwards.index_add(0, rows, found.forwards),
        backwards=best.backwards.index_add(0, rows, found.backwards),
    )
