"""Predictions in forward passes as large as the memory allows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from app.engine.served_model import ServedModel
from app.errors import OutOfMemory
from app.metrics import Metrics
from robust.memory import is_out_of_memory

logger = logging.getLogger(__name__)
T = TypeVar("T")

OUT_OF_MEMORY = "There is not enough memory for this now."
PASSES_BEFORE_GROWTH = 100  # full passes that must succeed before the batch size is doubled again


class Predictor:
    """Classifies images, in smaller batches while there is little memory.

    Running out of memory halves the batch size, and many successful full batches double it.
    """

    def __init__(self, max_batch: int, metrics: Metrics) -> None:
        self._max_batch, self._metrics = max_batch, metrics
        self._batch_limit = max_batch  # images that fit in memory in one forward pass
        self._full_passes = 0  # successful passes of that size in a row

    def probabilities(self, model: ServedModel, images: Tensor) -> Tensor:
        """Probabilities float32 (n, K). Raises OutOfMemory if a single image does not fit."""
        done: list[Tensor] = []
        while len(images):
            size = min(self._batch_limit, len(images))
            some = images if size == len(images) else images[:size]
            part = _none_if_out_of_memory(lambda: self._forward(model, some))  # noqa: B023
            if part is None:
                self._metrics.out_of_memory.inc()
                empty_cache(model)
                if size == 1:
                    raise OutOfMemory(OUT_OF_MEMORY)
                self._batch_limit, self._full_passes = size // 2, 0
                logger.warning("out of memory with %d images; trying %d", size, self._batch_limit)
                continue
            done.append(part)
            images = images[size:]
            self._full_passes += size == self._batch_limit < self._max_batch
            if self._full_passes >= PASSES_BEFORE_GROWTH:
                self._batch_limit = min(2 * self._batch_limit, self._max_batch)
                self._full_passes = 0
        return done[0] if len(done) == 1 else torch.cat(done)

    def _forward(self, model: ServedModel, images: Tensor) -> Tensor:
        self._metrics.batch_images.observe(len(images))
        return model.classify(images)


def empty_cache(model: ServedModel) -> None:
    """Return the memory that torch has cached to the device, if that is a GPU."""
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def _none_if_out_of_memory(function: Callable[[], T]) -> T | None:
    """The result of `function`; None if memory ran out.

    The exception is handled here, so its frames release the tensors of the failed call.
    """
    try:
        return function()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return None
