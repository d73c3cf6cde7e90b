"""A curved model whose logits of an image don't depend on the batch, and rows made by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust.attacks.rows import Rows

SHAPE = (3, 6, 6)


class Curved(nn.Module):
    """Works in float64, so that float32 logits do not depend on the batch. Counts its images."""

    def __init__(self, classes: int = 10, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.enter = nn.Parameter(torch.randn(108, 16, generator=generator).double() / 10)
        self.leave = nn.Parameter(torch.randn(16, classes, generator=generator).double())
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        hidden = torch.sin(3 * (x.double() - 0.5).flatten(1) @ self.enter)
        return (hidden @ self.leave).float()


@pytest.fixture
def make_curved() -> Callable[..., Curved]:
    return Curved


@pytest.fixture
def curved() -> Curved:
    return Curved()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(12, *SHAPE, generator=torch.Generator().manual_seed(2))


def make_rows(x: Tensor, **columns: Any) -> Rows[Any]:
    """New rows, one for each of the images `x`; `columns` replaces what is filled in."""
    n = len(x)
    zeros, never = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.bool)
    filled: dict[str, Any] = {
        "image": torch.arange(n),
        "run": zeros,
        "x": x,
        "y": zeros,
        "target": zeros,
        "eps": torch.full((n, 1, 1, 1), 0.1),
        "key": torch.arange(n),
        "clean_logits": None,
        "x_adv": x,
        "state": None,
        "forwards": zeros,
        "backwards": zeros,
        "best_x": x,
        "best_logits": None,
        "best_score": torch.full((n,), -torch.inf),
        "fooled": never,
        "fools": never,
    }
    return Rows(**filled | columns)
