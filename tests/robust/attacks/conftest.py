"""A curved model that gives an image the same logits whatever comes with it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

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
