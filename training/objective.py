"""The loss of one batch: clean and attacked parts, or TRADES."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.attacks import frozen
from robust.threat_model import ThreatModel
from training.adversary import make_adversarial
from training.distributed import Share
from training.recipe import AdversarialPart, Phase


def taught(targets: Tensor, teacher: nn.Module, x: Tensor, *, share: float) -> Tensor:
    """Targets (N, K) of which `share` is what `teacher` predicts for the images x.

    Source: Tarvainen & Valpola 2017, arXiv:1703.01780, and for adversarial training Dong et al.
    2022, arXiv:2106.01606.
    """
    if share == 0:
        return targets
    with torch.no_grad():
        prediction: Tensor = teacher(x).softmax(dim=1)
    return (1 - share) * targets + share * prediction


def attacked(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    *,
    phase: Phase,
    threat_model: ThreatModel,
    generator: torch.Generator,
    share: Share | None = None,
) -> list[Tensor]:
    """What `objective` takes the loss of: images x, float32 (N, 3, H, W) in [0, 1], attacked.

    `targets` float32 (N, K) are distributions. Attacks see the model in eval mode. Returns one
    tensor of all images where the phase is `split`, else one for each part; for TRADES the clean
    images and the attacked ones. `share` says of which batch these images are some.
    """
    share = share or Share(n=len(x))

    def attack(part: AdversarialPart, images: Tensor, towards: Tensor, share: Share) -> Tensor:
        return make_adversarial(
            model,
            images,
            towards,
            part=part,
            threat_model=threat_model,
            generator=generator,
            divergence=phase.loss == "trades",
            share=share,
        )

    if phase.loss == "trades":
        with frozen(model, x.device), torch.no_grad():
            clean = model(x).softmax(dim=1)
        return [x, attack(phase.parts[0], x, clean, share)]
    if phase.split:
        images = []
        for part, (start, stop) in zip(phase.parts, _spans(phase, share.n), strict=True):
            if stop > start:
                own, part_share = share.within(start, stop)
                images.append(attack(part, x[own], targets[own], part_share))
        # One batch of all parts, so that batch norm sees them together.
        return [torch.cat(images)]
    return [attack(part, x, targets, share) for part in phase.parts]


def objective(
    model: nn.Module,
    batches: list[Tensor],
    targets: Tensor,
    *,
    phase: Phase,
    label_smoothing: float,
) -> Tensor:
    """Mean loss, a scalar with gradient, of the images that `attacked` gave.

    `targets` float32 (N, K) are distributions; the model runs in the mode it is in.
    """
    if phase.loss == "trades":
        return _trades(model, batches, targets, phase.trades_beta, label_smoothing)
    shares = [1.0] if phase.split else [part.share for part in phase.parts]
    loss = torch.zeros((), device=targets.device)
    for share, images in zip(shares, batches, strict=True):
        part_loss = F.cross_entropy(model(images), targets, label_smoothing=label_smoothing)
        loss = loss + share * part_loss
    return loss


def _spans(phase: Phase, n: int) -> list[tuple[int, int]]:
    """Where each part's images begin and end, in the proportion of the shares."""
    edges, total = [0], 0.0
    for part in phase.parts:
        total += part.share
        edges.append(round(total * n))
    return list(pairwise(edges))


def _trades(
    model: nn.Module, batches: list[Tensor], targets: Tensor, beta: float, label_smoothing: float
) -> Tensor:
    """Source: Zhang et al. 2019, arXiv:1901.08573."""
    x, x_adv = batches
    logits, attacked = model(x), model(x_adv)
    divergence = F.kl_div(
        attacked.log_softmax(dim=1),
        logits.log_softmax(dim=1),
        reduction="batchmean",
        log_target=True,
    )
    natural = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    return natural + beta * divergence
