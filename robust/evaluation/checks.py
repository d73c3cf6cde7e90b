"""What is asked of a model before it is evaluated, and what is seen of it meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.attacks import Model, ModelError, frozen
from robust.attacks.passes import Passes
from robust.evaluation.result import Probes

PROBED = 100  # images
# Mean and std that people put before a model, by the data they are of; those of CIFAR-100 are
# too near to CIFAR-10's to tell apart.
NORMALISATIONS = {
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "mean and std of 0.5": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def probe(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    num_classes: int,
    allow_probabilities: bool = False,
    differentiate: bool = True,
    fast: Model | None = None,
    watch: Callable[[], None] = lambda: None,
    batch_size: int = 0,
) -> Probes:
    """Look at `model` on images float32 (N, C, H, W) in [0, 1] with labels int64 (N,).

    `fast` is a copy of it to compare with; without `differentiate` a model may have no gradient.
    `batch_size` bounds each pass, 0: not at all.
    Raises ModelError for one that can't be evaluated: another number of classes than
    `num_classes`, NaN or infinite logits, statistics that move while it predicts, no gradient,
    or probabilities instead of logits (unless allowed, and then flagged later).
    """

    def watched(x: Tensor) -> Tensor:
        watch()
        return model(x)

    passes, half = Passes(watched, batch_size), (len(x) + 1) // 2
    with frozen(model, x.device), _still(model):
        logits = passes.logits(x)
        # In other company, as a batch norm in train mode answers that differently.
        again = torch.cat([passes.logits(part) for part in torch.split(x, half)])
    with frozen(model, x.device):
        _check(logits, num_classes)
        probabilities = _are_probabilities(logits)
        if probabilities and not allow_probabilities:
            raise ModelError(
                "expected logits, got probabilities from the model: every row is in [0, 1] and "
                "sums to 1; leave its softmax out, or gradients vanish and attacks look weak"
            )
        gradient = _gradient(passes, x, y, needed=differentiate).flatten(1)
        searched = logits if fast is None else Passes(fast, batch_size).logits(x)
        best, name = _normalised(passes, x, y)
    nan = ~gradient.isfinite().all(dim=1)
    return Probes(
        n=len(x),
        difference=_difference(again, logits),
        probabilities=probabilities,
        zero_gradients=int(((gradient == 0).all(dim=1) & ~nan).sum()),
        nan_gradients=int(nan.sum()),
        right=int((logits.argmax(dim=1) == y).sum()),
        right_normalised=best,
        normalisation=name,
        search_difference=_difference(searched, logits),
    )


def check_finite(logits: Tensor) -> None:
    """Raise ModelError for logits (N, K) that are NaN or infinite."""
    bad = (~logits.isfinite()).any(dim=1)
    if bool(bad.any()):
        raise ModelError(
            f"expected finite logits, got NaN or infinities for {int(bad.sum())} of "
            f"{len(logits)} images"
        )


def _gradient(passes: Passes, x: Tensor, y: Tensor, *, needed: bool) -> Tensor:
    """Of the cross-entropy; 0 where the model has none and none is needed."""

    def loss(logits: Tensor, part: slice) -> Tensor:
        return F.cross_entropy(logits, y[part], reduction="none")

    try:
        return passes.gradient(x, loss)[2]
    except ModelError:
        if needed:
            raise
    return torch.zeros_like(x)


def _normalised(passes: Passes, x: Tensor, y: Tensor) -> tuple[int, str]:
    """How many images are right with the normalisation that suits best, and its name."""
    best, name = 0, ""
    for candidate, values in NORMALISATIONS.items() if x.shape[1] == 3 else ():
        mean, std = (x.new_tensor(row).view(1, 3, 1, 1) for row in values)
        try:
            logits = passes.logits((x - mean) / std)
        except (ValueError, AssertionError):
            continue  # a model that refuses such images expects others
        found = int((logits.argmax(dim=1) == y).sum())
        if found > best:
            best, name = found, candidate
    return best, name


def _difference(one: Tensor, other: Tensor) -> float:
    """Largest difference, as a share of the largest logit; 1 where one of them is not finite."""
    found = float((one - other).abs().max() / other.abs().max().clamp_min(1e-12))
    return found if math.isfinite(found) else 1.0


def _check(logits: Tensor, num_classes: int) -> None:
    if logits.shape[1] != num_classes:
        raise ModelError(
            f"expected logits for {num_classes} classes, got {logits.shape[1]} from the model"
        )
    check_finite(logits)


def _are_probabilities(logits: Tensor) -> bool:
    inside = bool((logits >= -1e-5).all()) and bool((logits <= 1 + 1e-5).all())
    return inside and bool(((logits.sum(dim=1) - 1).abs() < 1e-3).all())


@contextmanager
def _still(model: Model) -> Iterator[None]:
    """Raise ModelError where predicting moves the buffers of `model`; they are put back."""
    before = {name: buffer.detach().clone() for name, buffer in _buffers(model).items()}
    moved: list[str] = []
    try:
        yield
    finally:
        for name, now in _buffers(model).items():
            if not torch.equal(now.nan_to_num(), before[name].nan_to_num()):
                moved.append(name)
                now.copy_(before[name])
    if moved:
        raise ModelError(
            f"expected a model that predicting does not change, got one that moves {moved[0]}"
            + (f" and {len(moved) - 1} more" if len(moved) > 1 else "")
            + ": its batch norm runs in train mode though the model is in eval mode"
        )


def _buffers(model: Model) -> dict[str, Tensor]:
    return dict(model.named_buffers()) if isinstance(model, nn.Module) else {}
