"""One attack call: check the inputs, search all images, return results in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from robust.attacks.algorithm import Algorithm
from robust.attacks.checks import check_classes, check_eps, check_inputs, check_seed
from robust.attacks.frozen import Model, frozen
from robust.attacks.passes import Passes
from robust.attacks.result import AttackResult
from robust.attacks.search import Cancelled, for_rows, search
from robust.threat_model import ThreatModel


def run_algorithm(
    model: Model,
    algorithm: Algorithm[Any],
    x: Tensor,
    y: Tensor,
    *,
    threat_model: ThreatModel,
    eps: Tensor | None = None,
    target: Tensor | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    cancelled: Cancelled | None = None,
) -> AttackResult:
    """Run `algorithm` on images float32 (N, C, H, W) in [0, 1] with labels int64 (N,).

    `eps` float32 (N,) replaces that of the threat model, image by image. Raises ValueError for
    images, labels, targets or sizes out of range, and the errors of `search`.
    """
    check_inputs(x, y, target)
    check_seed(seed)
    if eps is None:
        eps = torch.full((len(x),), threat_model.eps, device=x.device)
    else:
        check_eps(eps, x, threat_model.norm)
    parts = list(
        search(
            model,
            algorithm,
            x,
            y,
            eps=eps.float().to(x.device),
            target=target,
            seed=seed,
            batch_size=batch_size,
            cancelled=cancelled,
        )
    )
    order = torch.cat([part.index for part in parts]).argsort().to(x.device)
    names = vars(parts[0].result)
    return AttackResult(
        **{name: torch.cat([getattr(part.result, name) for part in parts])[order] for name in names}
    )


def run_stages(
    model: Model,
    algorithms: Sequence[Algorithm[Any]],
    x: Tensor,
    y: Tensor,
    *,
    threat_model: ThreatModel,
    seed: int = 0,
    batch_size: int | None = None,
    cancelled: Cancelled | None = None,
) -> AttackResult:
    """Run the algorithms in turn, each on the images that no earlier one fooled.

    Arguments and errors are those of `run_algorithm`. Misclassified images are not attacked.
    """
    check_inputs(x, y)
    result = _clean(model, x, y, batch_size)
    for number, algorithm in enumerate(algorithms):
        done = result.success
        if cancelled is not None:
            done = done | cancelled().to(x.device)
        left = (~done).nonzero().squeeze(1)
        if len(left):
            found = run_algorithm(
                model,
                algorithm,
                x[left],
                y[left],
                threat_model=threat_model,
                seed=seed,
                batch_size=batch_size,
                cancelled=for_rows(cancelled, left),
            )
            result = _merged(result, found, left, take_failed=not number)
    return result


def _clean(model: Model, x: Tensor, y: Tensor, batch_size: int | None) -> AttackResult:
    """The result of no attack: the images themselves, with their logits."""
    passes = Passes(model)
    with frozen(model, x.device):
        parts = torch.split(x.float(), batch_size or len(x))
        logits = torch.cat([passes.logits(part) for part in parts])
    check_classes(logits.shape[1], y)
    zeros = torch.zeros_like(y)
    return AttackResult(
        x_adv=x.float(),
        logits=logits,
        success=logits.argmax(dim=1) != y,
        distance=zeros.float(),
        forwards=zeros + 1,
        backwards=zeros,
    )


def _merged(
    result: AttackResult, found: AttackResult, rows: Tensor, *, take_failed: bool
) -> AttackResult:
    """`result` updated with the result of a further attack on its `rows`."""
    taken = found.success | take_failed

    def put(name: str) -> Tensor:
        values: Tensor = getattr(result, name).clone()
        values[rows[taken]] = getattr(found, name)[taken]
        return values

    changed = {name: put(name) for name in ("x_adv", "logits", "success", "distance")}
    return replace(
        result,
        **changed,
        forwards=result.forwards.index_add(0, rows, found.forwards),
        backwards=result.backwards.index_add(0, rows, found.backwards),
    )
