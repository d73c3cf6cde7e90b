"""Averaged weights: an exponential moving average with its own batch-norm buffers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from robust.images import to_float

REFRESH_BATCHES = 16  # most batches for new batch-norm statistics


class AveragedModel:
    """Keeps `module`, a copy of `model` whose weights are the moving average of the model's.

    `decay` is per step; in the first steps it is (1 + t) / (10 + t) if that is lower, so that the
    initial weights are soon forgotten. With 0 the copy equals the model at every step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.steps = 0
        # Pairs of tensors, which stay the same objects when a state dict is loaded.
        mine, theirs = self.module.state_dict(), model.state_dict()
        pairs = [(mine[key], theirs[key]) for key in mine]
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counts = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the model by one step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        torch._foreach_lerp_(*_columns(self._floats), 1 - decay)
        if self._counts:
            torch._foreach_copy_(*_columns(self._counts))


def refresh_norms(model: nn.Module, images: Tensor, batch_size: int) -> None:
    """Compute the batch-norm statistics of `model` anew, from images uint8 (N, 3, H, W).

    Running statistics are those of the weights some ten steps ago, which in a run of few steps were
    other weights: the model may then predict one class for all images.
    """
    batches = max(1, len(images) // batch_size)
    # Each batch has images from everywhere, as they may be sorted by class.
    parts = (to_float(images[first::batches]) for first in range(min(batches, REFRESH_BATCHES)))
    update_bn(parts, model)


def _columns(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [mine for mine, _ in pairs], [theirs for _, theirs in pairs]
