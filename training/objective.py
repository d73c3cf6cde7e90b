"""The loss of one batch: clean and attacked parts, or TRADES."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.attacks import frozen
from robust.threat_model import ThreatModel
from training.adversary import make_adversarial
from training.recipe import Phase


def objective(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    *,
    phase: Phase,
    threat_model: ThreatModel,
    label_smoothing: float,
    generator: torch.Generator,
) -> Tensor:
    """Mean loss, a scalar with gradient, of images float32 (N, 3, H, W) in [0, 1].

    `targets` float32 (N, K) are distributions. Attacks see the model in eval mode; the loss
    itself runs in the mode the model is in.
    """
    if phase.loss == "trades":
        return _trades(
            model,
            x,
            targets,
            phase=phase,
            threat_model=threat_model,
            label_smoothing=label_smoothing,
            generator=generator,
        )
    if phase.split:
        images = []
        for part, (start, stop) in zip(phase.parts, _spans(phase, len(x)), strict=True):
            if stop > start:
                piece, labels = x[start:stop], targets[start:stop]
                images.append(
                    make_adversarial(
                        model,
                        piece,
                        labels,
                        part=part,
                        threat_model=threat_model,
                        generator=generator,
                    )
                )
        # One forward for all parts, so that batch norm sees them together.
        return F.cross_entropy(model(torch.cat(images)), targets, label_smoothing=label_smoothing)
    loss = torch.zeros((), device=x.device)
    for part in phase.parts:
        x_part = make_adversarial(
            model, x, targets, part=part, threat_model=threat_model, generator=generator
        )
        part_loss = F.cross_entropy(model(x_part), targets, label_smoothing=label_smoothing)
        loss = loss + part.share * part_loss
    return loss


def _spans(phase: Phase, n: int) -> list[tuple[int, int]]:
    """Where each part's images begin and end, in the proportion of the shares."""
    edges, total = [0], 0.0
    for part in phase.parts:
        total += part.share
        edges.append(round(total * n))
    return list(pairwise(edges))


def _trades(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    *,
    phase: Phase,
    threat_model: ThreatModel,
    label_smoothing: float,
    generator: torch.Generator,
) -> Tensor:
    """Source: Zhang et al. 2019, arXiv:1901.08573."""
    with frozen(model, x.device), torch.no_grad():
        clean = model(x).softmax(dim=1)
    x_adv = make_adversarial(
        model,
        x,
        clean,
        part=phase.parts[0],
        threat_model=threat_model,
        generator=generator,
        divergence=True,
    )
    logits, attacked = model(x), model(x_adv)
    divergence = F.kl_div(
        attacked.log_softmax(dim=1),
        logits.log_softmax(dim=1),
        reduction="batchmean",
        log_target=True,
    )
    natural = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    return natural + phase.trades_beta * divergence
