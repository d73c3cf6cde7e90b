"""Projected gradient descent and, as its single step, the fast gradient sign method."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robust.attacks.frozen import Model, frozen
from robust.attacks.result import AttackResult
from robust.threat_model import ThreatModel


def fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat_model: ThreatModel,
    target: Tensor | None = None,
) -> AttackResult:
    """One step of length eps along the gradient.

    Images float32 (N, C, H, W) in [0, 1], labels and targets int64 (N,). For `linf` this is the
    fast gradient sign method; for `l2` the step follows the gradient itself. Raises ValueError
    as `pgd` does. Source: Goodfellow et al. 2015, arXiv:1412.6572.
    """
    return pgd(
        model,
        x,
        y,
        threat_model=threat_model,
        alpha=threat_model.eps,
        steps=1,
        random_start=False,
        target=target,
    )


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
    target: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> AttackResult:
    """Climb the cross-entropy in `steps` steps of length `alpha`, each pulled back into the ball.

    Images float32 (N, C, H, W) in [0, 1], labels int64 (N,), `alpha` in pixel units. With `target`
    int64 (N,) the loss towards that class is descended instead. Every iterate is scored, the
    last included, and of those that fool the model (or else of all) the one of the highest loss
    is kept. Restarts go on with the images not yet fooled; with `early_stop` a fooled image
    leaves at once and `x_adv` is its first success. Without `generator` starts are those of
    seed 0. Raises ValueError for images, labels or settings out of range.
    Source: Madry et al. 2018, arXiv:1706.06083.
    """
    check_inputs(x, y, target)
    if steps < 1 or restarts < 1:
        raise ValueError(f"expected at least 1 step and 1 restart, got {steps} and {restarts}")
    if not alpha >= 0:
        raise ValueError(f"expected alpha of at least 0, got {alpha}")
    if generator is None:
        generator = torch.Generator(x.device).manual_seed(0)
    best = _Best(x, y, target)
    with frozen(model, x.device):
        for restart in range(restarts):
            active = torch.arange(len(x), device=x.device)
            if restart:
                active = active[~best.fooled]
            if not len(active):
                break
            origin = x[active]
            x_adv = threat_model.random_start(origin, generator) if random_start else origin.clone()
            for step in range(steps + 1):
                last = step == steps
                logits, loss, gradient = _loss_and_gradient(
                    model, x_adv, best.labels[active], sign=best.sign, differentiate=not last
                )
                best.update(active, x_adv, logits, loss, backward=not last)
                if last:
                    break
                assert gradient is not None
                x_adv = threat_model.project(
                    x_adv + alpha * threat_model.steepest(gradient), origin
                )
                if early_stop:
                    remaining = ~best.fooled[active]
                    active, x_adv, origin = active[remaining], x_adv[remaining], origin[remaining]
                    if not len(active):
                        break
    return best.result(threat_model)


def _loss_and_gradient(
    model: Model, x_adv: Tensor, labels: Tensor, *, sign: int, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    with torch.set_grad_enabled(differentiate):
        x_adv = x_adv.detach().requires_grad_(differentiate)
        logits = model(x_adv).float()
        loss = sign * F.cross_entropy(logits, labels, reduction="none")
        gradient = torch.autograd.grad(loss.sum(), x_adv)[0] if differentiate else None
    return logits.detach(), loss.detach(), gradient


class _Best:
    """For each image the best iterate so far: fooling before not fooling, then the higher loss."""

    def __init__(self, x: Tensor, y: Tensor, target: Tensor | None) -> None:
        n, device = len(x), x.device
        self.x, self.targeted = x, target is not None
        self.labels = y if target is None else target
        self.sign = 1 if target is None else -1
        self.x_adv, self.logits = x.clone(), torch.empty(0)
        self.loss = torch.full((n,), -torch.inf, device=device)
        self.fooled = torch.zeros(n, dtype=torch.bool, device=device)
        self.forwards = torch.zeros(n, dtype=torch.int64, device=device)
        self.backwards = torch.zeros(n, dtype=torch.int64, device=device)

    def update(
        self, active: Tensor, x_adv: Tensor, logits: Tensor, loss: Tensor, *, backward: bool
    ) -> None:
        if not self.logits.numel():
            self.logits = logits.new_zeros(len(self.x), logits.shape[1])
        hit = logits.argmax(dim=1) == self.labels[active]
        fooled = hit if self.targeted else ~hit
        was = self.fooled[active]
        better = (fooled & ~was) | ((fooled == was) & (loss > self.loss[active]))
        rows = active[better]
        self.x_adv[rows], self.logits[rows] = x_adv.detach()[better], logits[better]
        self.loss[rows] = loss[better]
        self.fooled[active] = was | fooled
        self.forwards[active] += 1
        self.backwards[active] += int(backward)

    def result(self, threat_model: ThreatModel) -> AttackResult:
        return AttackResult(
            x_adv=self.x_adv,
            logits=self.logits,
            success=self.fooled,
            distance=threat_model.distance(self.x_adv, self.x),
            forwards=self.forwards,
            backwards=self.backwards,
        )


def check_inputs(x: Tensor, y: Tensor, target: Tensor | None = None) -> None:
    """Raise ValueError unless images, labels and targets have the shapes and ranges expected."""
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"expected float images (N, C, H, W), got {x.dtype} {tuple(x.shape)}")
    if not len(x):
        raise ValueError("expected at least 1 image, got none")
    for name, labels in (("labels", y), ("targets", target)):
        if labels is None:
            continue
        if labels.shape != (len(x),) or labels.dtype != torch.int64:
            raise ValueError(
                f"expected {name} int64 ({len(x)},), got {labels.dtype} {tuple(labels.shape)}"
            )
    low, high = x.min().item(), x.max().item()
    if not (low >= 0 and high <= 1):  # also refuses NaN
        raise ValueError(f"expected images in [0, 1], got values from {low:g} to {high:g}")
    if target is not None and bool((target == y).any()):
        raise ValueError("expected a target other than the label, got the label itself")
