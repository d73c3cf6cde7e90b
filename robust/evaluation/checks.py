"""What is asked of a model before it is evaluated, and what is seen of it meanwhile."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.attacks import Model, ModelError, frozen
from robust.attacks.passes import Passes
from robust.evaluation.result import Probes

PROBED = 100  # images
# Mean and std that people put before a model, by the data they are of.
NORMALISATIONS = {
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR-100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mean and std of 0.5": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def probe(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    num_classes: int,
    allow_probabilities: bool = False,
) -> Probes:
    """Look at `model` on images float32 (N, C, H, W) in [0, 1] with labels int64 (N,).

    Raises ModelError for one that can't be evaluated: another number of classes than
    `num_classes`, NaN or infinite logits, statistics that move while it predicts, or
    probabilities instead of logits (unless allowed, and then flagged later).
    """
    passes = Passes(model)
    buffers = _buffers(model)
    with frozen(model, x.device):
        logits = passes.logits(x)
        again = passes.logits(x)
        _check_still(model, buffers)
        _check(logits, num_classes)
        probabilities = _are_probabilities(logits)
        if probabilities and not allow_probabilities:
            raise ModelError(
                "expected logits, got probabilities from the model: every row is in [0, 1] and "
                "sums to 1; leave its softmax out, or gradients vanish and attacks look weak"
            )
        _, _, gradient = passes.gradient(
            x, lambda piece, part: F.cross_entropy(piece, y[part], reduction="none")
        )
        right, best = (logits.argmax(dim=1) == y), 0
        name = ""
        for candidate, (mean, std) in NORMALISATIONS.items() if x.shape[1] == 3 else ():
            shift, scale = (x.new_tensor(values).view(1, 3, 1, 1) for values in (mean, std))
            found = int((passes.logits((x - shift) / scale).argmax(dim=1) == y).sum())
            if found > best:
                best, name = found, candidate
    flat = gradient.flatten(1)
    nan = ~flat.isfinite().all(dim=1)
    return Probes(
        n=len(x),
        difference=float((again - logits).abs().max() / logits.abs().max().clamp_min(1e-12)),
        probabilities=probabilities,
        zero_gradients=int(((flat == 0).all(dim=1) & ~nan).sum()),
        nan_gradients=int(nan.sum()),
        right=int(right.sum()),
        right_normalised=best,
        normalisation=name,
    )


def _check(logits: Tensor, num_classes: int) -> None:
    if logits.shape[1] != num_classes:
        raise ModelError(
            f"expected logits for {num_classes} classes, got {logits.shape[1]} from the model"
        )
    if not bool(logits.isfinite().all()):
        rows = int((~logits.isfinite()).any(dim=1).sum())
        raise ModelError(
            f"expected finite logits, got NaN or infinities for {rows} of {len(logits)} images"
        )


def _are_probabilities(logits: Tensor) -> bool:
    inside = bool((logits >= -1e-5).all()) and bool((logits <= 1 + 1e-5).all())
    return inside and bool(((logits.sum(dim=1) - 1).abs() < 1e-3).all())


def _buffers(model: Model) -> dict[str, Tensor]:
    if not isinstance(model, nn.Module):
        return {}
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def _check_still(model: Model, before: dict[str, Tensor]) -> None:
    moved = [name for name, now in _buffers(model).items() if not torch.equal(now, before[name])]
    if moved:
        raise ModelError(
            f"expected a model that predicting does not change, got one that moves {moved[0]}"
            + (f" and {len(moved) - 1} more" if len(moved) > 1 else "")
            + ": its batch norm runs in train mode though the model is in eval mode"
        )
