"""Target classes of attacks that try several in turn."""

from __future__ import annotations

import torch
from torch import Tensor


def nth_likeliest(logits: Tensor, y: Tensor, n: Tensor) -> Tensor:
    """The `n`-th likeliest class other than `y`, from 0: int64 (N,), like `y` and `n`."""
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf)
    order = others.argsort(dim=1, descending=True)
    return order.gather(1, n.unsqueeze(1)).squeeze(1)
