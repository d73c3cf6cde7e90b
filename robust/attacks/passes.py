"""Forward and backward passes through the model, in batches that fit in memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robust.attacks.frozen import Model
from robust.memory import is_out_of_memory

logger = logging.getLogger(__name__)

# Loss (M,) of logits (M, K); the slice says which images they belong to.
SliceLoss = Callable[[Tensor, slice], Tensor]


class ModelError(ValueError):
    """The model can't be attacked or evaluated; the message says why."""


def check_logits(logits: Any, x: Tensor) -> Tensor:
    """The output of a model for images (N, C, H, W), float (N, K). Raises ModelError."""
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"expected logits as a tensor, got {type(logits).__name__}{logits_hint(logits)}"
        )
    if logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        raise ModelError(
            f"expected logits ({len(x)}, K) with at least 2 classes, got "
            f"{tuple(logits.shape)} from the model"
        )
    if not logits.is_floating_point():
        raise ModelError(f"expected float logits, got {logits.dtype} from the model")
    return logits


def logits_hint(output: Any) -> str:
    """How to take the logits from what a model returned; empty if they are not found in it."""
    if isinstance(getattr(output, "logits", None), Tensor):
        part = ".logits"
    elif isinstance(output, dict) and isinstance(output.get("logits"), Tensor):
        part = "['logits']"
    elif isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        part = "[0]"
    else:
        return ""
    return f"; give a callable such as lambda x: model(x){part}"


class Meter:
    """Counts passes and their seconds, by kind (with or without gradient) and batch size."""

    def __init__(self) -> None:
        self._spent: dict[tuple[bool, int], tuple[int, float]] = {}

    def add(self, size: int, seconds: float, *, with_gradient: bool) -> None:
        """Record a pass and its number of images."""
        count, so_far = self._spent.get((with_gradient, size), (0, 0.0))
        self._spent[with_gradient, size] = count + 1, so_far + seconds

    @property
    def passes(self) -> int:
        """Total forward and backward passes, counted per image."""
        return sum(
            size * count * (1 + with_gradient)
            for (with_gradient, size), (count, _) in self._spent.items()
        )

    @property
    def seconds(self) -> float:
        """Total time of all passes."""
        return sum(seconds for _, seconds in self._spent.values())

    @property
    def limit(self) -> float:
        """Time of the same passes at the rate of the fastest batch size seen."""
        total = 0.0
        for kind in (False, True):
            spent = {size: v for (with_gradient, size), v in self._spent.items()
                     if with_gradient == kind}  # fmt: skip
            images = sum(size * count for size, (count, _) in spent.items())
            rates = [seconds / (size * count) for size, (count, seconds) in spent.items()]
            total += images * min(rates, default=0.0)
        return total


class Passes:
    """Calls `model` with at most `batch_size` images per pass, or with all at once if it is 0.

    A batch that does not fit in memory is halved, and so are all later ones. `meter` records every
    pass.
    """

    def __init__(self, model: Model, batch_size: int = 0, meter: Meter | None = None) -> None:
        self._model, self._batch_size, self._meter = model, batch_size, meter

    def logits(self, x: Tensor) -> Tensor:
        """Logits float32 (N, K) of images float32 (N, C, H, W). Raises ModelError."""

        def part(rows: slice) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (self._call(x[rows]),)

        return self._in_parts(part, len(x), with_gradient=False)[0]

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

        logits, losses, gradient = self._in_parts(part, len(x), with_gradient=True)
        return logits, losses, gradient

    def _call(self, x: Tensor) -> Tensor:
        version = 0 if x.is_inference() else x._version  # inference tensors have none
        logits = self._model(x)
        if not x.is_inference() and x._version != version:
            raise ModelError(
                "expected a model that leaves its images unchanged, got one that modifies them"
            )
        return check_logits(logits, x).float()

    def _in_parts(
        self, part: Callable[[slice], tuple[Tensor, ...]], n: int, *, with_gradient: bool
    ) -> list[Tensor]:
        parts: list[tuple[Tensor, ...]] = []
        start = 0
        while start < n:
            stop = min(n, start + (self._batch_size or n))
            begin = time.perf_counter()
            try:
                parts.append(part(slice(start, stop)))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or stop - start == 1:
                    raise
                self._batch_size = (stop - start) // 2
            else:
                if self._meter is not None:
                    spent = time.perf_counter() - begin
                    self._meter.add(stop - start, spent, with_gradient=with_gradient)
                start = stop
                continue
            # Outside the handler: the exception keeps the failed pass's memory alive.
            logger.warning("out of memory; continuing with batches of %d images", self._batch_size)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if len(parts) == 1:
            return list(parts[0])
        return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
