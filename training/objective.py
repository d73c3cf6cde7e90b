"""The loss of one batch, from clean and attacked parts or as in TRADES."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.attacks import frozen
from robust.threat_model import ThreatModel
from training.adversary import make_adversarial
from training.distributed import Shard
from training.recipe import AdversarialPart, Phase


def distilled_targets(targets: Tensor, teacher: nn.Module, x: Tensor, *, weight: float) -> Tensor:
    """Targets (N, K) blended with the predictions of `teacher` for the images x.

    `weight` in [0, 1] is the share of the predictions. Source: Tarvainen & Valpola 2017,
    arXiv:1703.01780; for adversarial training Dong et al. 2022, arXiv:2106.01606.
    """
    if weight == 0:
        return targets
    with torch.no_grad():
        prediction: Tensor = teacher(x).softmax(dim=1)
    return (1 - weight) * targets + weight * prediction


def adversarial_batches(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    *,
    phase: Phase,
    threat_model: ThreatModel,
    generator: torch.Generator,
    shard: Shard | None = None,
) -> list[Tensor]:
    """The batches for `objective`, made by attacking the images x, float32 (N, 3, H, W) in [0, 1].

    `targets` float32 (N, K) are distributions. Attacks see the model in eval mode. Returns one
    batch of all images if the phase is `split`, otherwise one per part; for TRADES the clean and
    the adversarial images. `shard` is the position of these images in the whole batch.
    """
    shard = shard or Shard(n=len(x))

    def attack(part: AdversarialPart, images: Tensor, targets: Tensor, shard: Shard) -> Tensor:
        return make_adversarial(
            model,
            images,
            targets,
            part=part,
            threat_model=threat_model,
            generator=generator,
            divergence=phase.loss == "trades",
            shard=shard,
        )

    if phase.loss == "trades":
        with frozen(model, x.device), torch.no_grad():
            clean = model(x).softmax(dim=1)
        return [x, attack(phase.parts[0], x, clean, shard)]
    if phase.split:
        images = []
        for part, (start, stop) in zip(phase.parts, _spans(phase, shard.n), strict=True):
            if stop > start:
                own, part_shard = shard.within(start, stop)
                images.append(attack(part, x[own], targets[own], part_shard))
        # One batch of all parts, so that batch norm sees them together.
        return [torch.cat(images)]
    return [attack(part, x, targets, shard) for part in phase.parts]


def attacked_sizes(phase: Phase, shard: Shard) -> set[int]:
    """The numbers of images of `shard` that the attacks of a step get, for compiling them."""
    attacked = [part.attack_steps > 0 for part in phase.parts]
    if not phase.split:
        return {shard.count} if any(attacked) else set()
    own = [shard.within(*span)[1] for span in _spans(phase, shard.n)]
    return {part.count for part, used in zip(own, attacked, strict=True) if used and part.count}


def objective(
    model: nn.Module,
    batches: list[Tensor],
    targets: Tensor,
    *,
    phase: Phase,
    label_smoothing: float,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Mean loss of the batches from `adversarial_batches`, a scalar with gradient.

    `targets` float32 (N, K) are distributions; the model runs in the mode it is in. With
    `class_weights` float32 (K,) each image's loss counts by the weight of its target.
    """
    weights = None if class_weights is None else (targets * class_weights).sum(dim=1)
    if phase.loss == "trades":
        return _trades(model, batches, targets, phase.trades_beta, label_smoothing, weights)
    shares = [1.0] if phase.split else [part.share for part in phase.parts]
    loss = torch.zeros((), device=targets.device)
    for share, images in zip(shares, batches, strict=True):
        part_loss = _cross_entropy(model(images), targets, label_smoothing, weights)
        loss = loss + share * part_loss
    return loss


def _spans(phase: Phase, n: int) -> list[tuple[int, int]]:
    """Start and stop of each part's images in a batch of n, in proportion to the shares."""
    edges, total = [0], 0.0
    for part in phase.parts:
        total += part.share
        edges.append(round(total * n))
    return list(pairwise(edges))


def _trades(
    model: nn.Module,
    batches: list[Tensor],
    targets: Tensor,
    beta: float,
    label_smoothing: float,
    weights: Tensor | None,
) -> Tensor:
    """The loss of TRADES. Source: Zhang et al. 2019, arXiv:1901.08573."""
    x, x_adv = batches
    logits, logits_adv = model(x), model(x_adv)
    natural = _cross_entropy(logits, targets, label_smoothing, weights)
    log_p, log_q = logits_adv.log_softmax(dim=1), logits.log_softmax(dim=1)
    if weights is None:
        divergence = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    else:
        each = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=1)
        divergence = (weights * each).mean()
    return natural + beta * divergence


def _cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: float, weights: Tensor | None
) -> Tensor:
    """Mean cross-entropy, with the loss of each image times its weight."""
    if weights is None:
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    each = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    return (weights * each).mean()
