"""Forward and backward passes of an attack, in parts that fit the memory."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from robust.attacks.frozen import Model
from robust.memory import is_out_of_memory

logger = logging.getLogger(__name__)

# The loss of logits (M, K) that belong to the images of this slice, (M,).
SliceLoss = Callable[[Tensor, slice], Tensor]


class ModelError(ValueError):
    """A model that can't be attacked or evaluated as it is; the message says why."""


class Passes:
    """Calls `model` with at most so many images, 0: with all there are.

    Where a batch does not fit the memory it is halved from then on.
    """

    def __init__(self, model: Model, most: int = 0) -> None:
        self._model, self._most = model, most

    def logits(self, x: Tensor) -> Tensor:
        """Logits float32 (N, K) of images float32 (N, C, H, W). Raises ModelError."""

        def part(rows: slice) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (self._call(x[rows]),)

        return self._in_parts(part, len(x))[0]

    def gradient(self, x: Tensor, loss: SliceLoss) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, K), losses (N,) and the gradient of their sum at `x`. Raises ModelError."""

        def part(rows: slice) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                piece = x[rows].detach().requires_grad_()
                logits = self._call(piece)
                losses = loss(logits, rows)
                (gradient,) = (
                    torch.autograd.grad(losses.sum(), piece, allow_unused=True)
                    if losses.requires_grad
                    else (None,)
                )
            if gradient is None:
                raise ModelError(
                    "expected logits with a gradient at the images, got none from the model; "
                    "square takes none"
                )
            return logits.detach(), losses.detach(), gradient

        logits, losses, gradient = self._in_parts(part, len(x))
        return logits, losses, gradient

    def _call(self, x: Tensor) -> Tensor:
        version = 0 if x.is_inference() else x._version  # of one made in a caller's inference mode
        logits = self._model(x)
        if not x.is_inference() and x._version != version:
            raise ModelError(
                "expected a model that leaves its images as they are, got them changed"
            )
        if not isinstance(logits, Tensor):
            raise ModelError(f"expected logits as a tensor, got {type(logits).__name__}")
        if logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
            raise ModelError(
                f"expected logits ({len(x)}, K) with at least 2 classes, got "
                f"{tuple(logits.shape)} from the model"
            )
        if not logits.is_floating_point():
            raise ModelError(f"expected float logits, got {logits.dtype} from the model")
        return logits.float()

    def _in_parts(self, part: Callable[[slice], tuple[Tensor, ...]], n: int) -> list[Tensor]:
        parts: list[tuple[Tensor, ...]] = []
        start = 0
        while start < n:
            stop = min(n, start + (self._most or n))
            try:
                parts.append(part(slice(start, stop)))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or stop - start == 1:
                    raise
                self._most = (stop - start) // 2
            else:
                start = stop
                continue
            # Outside the handler: the exception holds on to what the failed pass had allocated.
            logger.warning("out of memory; going on with batches of %d images", self._most)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if len(parts) == 1:
            return list(parts[0])
        return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]


def check_classes(found: int, y: Tensor, target: Tensor | None = None) -> None:
    """Raise ValueError unless a model of `found` classes has all labels and targets."""
    for name, labels in (("labels", y), ("targets", target)):
        if labels is None:
            continue
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= found:
            raise ValueError(
                f"expected {name} from 0 to {found - 1}, for the {found} classes of the model, "
                f"got {low} to {high}"
            )
