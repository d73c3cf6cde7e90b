"""Adversarial examples for training, with only the passes that the recipe specifies."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robust.attacks import Model, frozen
from robust.attacks.pgd import default_alpha as pgd_default_alpha
from robust.threat_model import ThreatModel
from training.distributed import Shard
from training.recipe import AdversarialPart


def make_adversarial(
    model: Model,
    x: Tensor,
    targets: Tensor,
    *,
    part: AdversarialPart,
    threat_model: ThreatModel,
    generator: torch.Generator,
    divergence: bool = False,
    shard: Shard | None = None,
) -> Tensor:
    """Adversarial images of the same shape, for images float32 (N, 3, H, W) in [0, 1].

    The attack is that of `part`, on the model in eval mode. `targets` (N, K) are distributions:
    labels, or with `divergence` (TRADES) the model's own clean prediction. `n-fgsm` leaves the ball
    on purpose, see `AdversarialPart`. `shard` is the position of these images in the whole batch,
    for the random numbers; by default they are all of it.
    """
    eps, kind = threat_model.eps, part.kind
    if kind == "clean" or eps == 0:
        return x
    alpha, shard = part.alpha or default_alpha(part, eps), shard or Shard(n=len(x))

    def noise() -> Tensor:
        return shard.draw(threat_model.noise, x, generator)

    with frozen(model, x.device):
        if kind == "n-fgsm":
            start = x + 2 * noise()
            return start + alpha * threat_model.steepest(_gradient(model, start, targets))
        if divergence:
            # The divergence has its minimum at the clean image, where its gradient is zero.
            x_adv = threat_model.project(x + 0.1 * noise(), x)
        else:
            x_adv = x if kind == "fgsm" else threat_model.project(x + noise(), x)
        for _ in range(part.attack_steps):
            gradient = _gradient(model, x_adv, targets)
            x_adv = threat_model.project(x_adv + alpha * threat_model.steepest(gradient), x)
        return x_adv


def default_alpha(part: AdversarialPart, eps: float) -> float:
    """The step size, in pixel units, of a part without `alpha`."""
    if part.kind == "fgsm-rs":
        return 1.25 * eps
    if part.kind == "pgd":
        return pgd_default_alpha(eps, part.steps)
    return eps


def _gradient(model: Model, x_adv: Tensor, targets: Tensor) -> Tensor:
    with torch.enable_grad():
        x_adv = x_adv.detach().requires_grad_(True)
        loss = F.cross_entropy(model(x_adv), targets, reduction="sum")
        return torch.autograd.grad(loss, x_adv)[0]
