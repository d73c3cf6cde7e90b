"""Probes of a model before it is evaluated."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.attacks import Model, ModelError, frozen
from robust.attacks.passes import Meter, Passes
from robust.evaluation.flags import FEWEST, fewest_significant
from robust.evaluation.models import Models, check_finite
from robust.evaluation.result import Probes
from robust.memory import is_out_of_memory

PROBED = 50  # images to classify
COMPARED = 16  # of these, images on which two passes are compared
COMPARED_WITH_COPY = 2  # the same for a Classifier, whose fast copy was compared when it was made
DIFFERENTIATED = 8  # images whose gradient is checked
TRIED = 8  # images that decide whether a normalization is tried on all
# Usual means and stds by dataset; those of CIFAR-100 are too close to CIFAR-10's to tell apart.
NORMALIZATIONS = {
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "mean and std of 0.5": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def probe(
    models: Models,
    x: Tensor,
    y: Tensor,
    *,
    num_classes: int,
    allow_probabilities: bool = False,
    differentiate: bool = True,
    batch_size: int = 0,
    meter: Meter | None = None,
) -> tuple[Probes, Tensor, float]:
    """Probe the models on images float32 (N, C, H, W) in [0, 1] with labels int64 (N,).

    Returns the probe results, the predictions int64 (N,) of the exact model, on the CPU, and the
    seconds per pass of one image, forward or backward, through the searched model. Without
    `differentiate` a model may have no gradient. `batch_size` limits each pass; 0: no limit.
    `meter` records the passes of the exact model.

    Raises ModelError for a model that can't be evaluated: a number of classes other than
    `num_classes`, NaN or infinite logits, statistics that prediction changes, no gradient, or
    probabilities instead of logits (unless allowed, and then flagged later).
    """
    passes, search = Passes(models.exact, batch_size, meter), Passes(models.search, batch_size)
    few = x[: COMPARED_WITH_COPY if models.has_fast else COMPARED]
    some = slice(DIFFERENTIATED)
    with frozen(models.original, x.device), _unchanged(models.original):
        expected = passes.logits(few)
        # With another batch size, which changes the output of batch norm in train mode.
        again = torch.cat([passes.logits(part) for part in torch.split(few, (len(few) + 1) // 2)])
        fast = Passes(models.fast, batch_size).logits(few) if models.has_fast else expected
        models.trust_fast(max(_difference(again, expected), _difference(fast, expected)))
        rest = x[len(few) :]
        logits = torch.cat([expected, passes.logits(rest)]) if len(rest) else expected
    with frozen(models.original, x.device):
        _check(logits, num_classes)
        probabilities = _are_probabilities(logits)
        if probabilities and not allow_probabilities:
            raise ModelError(
                "expected logits, got probabilities from the model: every row is in [0, 1] and "
                "sums to 1; remove its softmax, or gradients vanish and attacks look weak"
            )
        begin = time.perf_counter()
        gradient = _gradient(search, x[some], y[some], needed=differentiate)
        if x.device.type != "cpu":
            torch.accelerator.synchronize()
        seconds = (time.perf_counter() - begin) / len(x[some]) / (1 if gradient is None else 2)
        predicted = logits.argmax(dim=1)
        best, name = None, ""
        if len(x) >= FEWEST:  # too few for a conclusion otherwise
            best, name = _best_normalization(search, x, y, predicted)
    nan, zero = _count_unusable(gradient)
    found = Probes(
        n=len(x),
        difference=_difference(again, expected),
        probabilities=probabilities,
        differentiated=0 if gradient is None else len(x[some]),
        zero_gradients=zero,
        nan_gradients=nan,
        right=int((predicted == y).sum()),
        right_normalized=best,
        normalization=name,
        search_difference=_difference(fast, expected),
        sigmoid=len(x) >= PROBED and not probabilities and _fills_unit_interval(logits),
    )
    return found, predicted.cpu(), seconds


def _gradient(passes: Passes, x: Tensor, y: Tensor, *, needed: bool) -> Tensor | None:
    """The gradient of the cross-entropy; None if the model has none and none is needed."""

    def loss(logits: Tensor, part: slice) -> Tensor:
        return F.cross_entropy(logits, y[part], reduction="none")

    try:
        return passes.gradient(x, loss)[2]
    except (ModelError, RuntimeError) as error:  # torch refuses to convert a gradient to NumPy
        if needed or is_out_of_memory(error):
            raise
    return None


def _count_unusable(gradient: Tensor | None) -> tuple[int, int]:
    """Number of images with NaN or infinity in the gradient, and with an all-zero gradient."""
    if gradient is None:  # no attack uses it
        return 0, 0
    rows = gradient.flatten(1)
    nan = ~rows.isfinite().all(dim=1)
    return int(nan.sum()), int(((rows == 0).all(dim=1) & ~nan).sum())


def _best_normalization(
    passes: Passes, x: Tensor, y: Tensor, predicted: Tensor
) -> tuple[int | None, str]:
    """Number of correct images with the best normalization, and its name.

    None if no normalization beats predicting without one on the first few images, or if none can
    get significantly more images right, and more than those of any one class.
    """
    best: tuple[int | None, str] = None, ""
    tried = int((predicted[:TRIED] == y[:TRIED]).sum())
    # A wrong normalization can make a model answer one class for all images, which is right for
    # those of that class.
    most_of_a_class = int(y.bincount().max())
    needed = max(fewest_significant(int((predicted == y).sum()), len(x)), most_of_a_class + 1)
    if needed > len(x):
        return best
    for name, values in NORMALIZATIONS.items() if x.shape[1] == 3 else ():
        mean, std = (x.new_tensor(row).view(1, 3, 1, 1) for row in values)
        normalized = (x - mean) / std
        try:
            correct = _count_correct(passes, normalized[:TRIED], y[:TRIED])
            if correct <= tried or correct + len(x[TRIED:]) < needed:
                continue
            correct += _count_correct(passes, normalized[TRIED:], y[TRIED:])
        except (ValueError, AssertionError):
            continue  # the model itself refuses values outside [0, 1]
        if correct > max(best[0] or 0, most_of_a_class):
            best = correct, name
    return best


def _count_correct(passes: Passes, x: Tensor, y: Tensor) -> int:
    return int((passes.logits(x).argmax(dim=1) == y).sum())


def _difference(one: Tensor, other: Tensor) -> float:
    """Largest difference relative to the largest logit; 1 if any logit is not finite."""
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


def _fills_unit_interval(logits: Tensor) -> bool:
    """Whether all outputs are in [0, 1], and some near its ends, as those of a sigmoid."""
    low, high = float(logits.min()), float(logits.max())
    return 0 <= low < 0.1 and 0.9 < high <= 1


@contextmanager
def _unchanged(model: Model) -> Iterator[None]:
    """Raise ModelError if predictions change the buffers of `model`, which are restored."""
    before = {name: buffer.detach().clone() for name, buffer in _buffers(model).items()}
    changed: list[str] = []
    try:
        yield
    finally:
        for name, now in _buffers(model).items():
            if not torch.equal(now.nan_to_num(), before[name].nan_to_num()):
                changed.append(name)
                now.copy_(before[name])
    if changed:
        raise ModelError(
            f"expected a model that prediction leaves unchanged, got one that changes {changed[0]}"
            + (f" and {len(changed) - 1} more" if len(changed) > 1 else "")
            + ": its batch norm runs in train mode though the model is in eval mode"
        )


def _buffers(model: Model) -> dict[str, Tensor]:
    return dict(model.named_buffers()) if isinstance(model, nn.Module) else {}
