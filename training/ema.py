"""Averaged weights: an exponential moving average with batch-norm buffers of its own."""

from __future__ import annotations

import copy

import torch
from torch import nn


class AveragedModel:
    """A copy of `model` that follows it slowly.

    `decay` is per step; while the run is young it is (1 + t) / (10 + t) if that is lower, so
    that the random start is soon forgotten. 0 makes the copy follow at once.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards `model` by one step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        mine, theirs = self.module.state_dict(), model.state_dict()
        floats = [key for key, value in mine.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [mine[key] for key in floats], [theirs[key] for key in floats], 1 - decay
        )
        for key in mine.keys() - set(floats):
            mine[key].copy_(theirs[key])
