"""Models whose outputs are known by hand."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

SHAPE = (3, 4, 4)


class Linear(nn.Module):
    """Two classes, logits (0, w.x + b): the margin of class 1 is w.x + b. Counts its images."""

    def __init__(self, seed: int = 0, bias: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(SHAPE, generator=generator))
        self.bias = bias
        self._counted = SimpleNamespace(images=0)  # not a number, which would identify the model

    @property
    def images(self) -> int:
        return int(self._counted.images)

    @images.setter
    def images(self, count: int) -> None:
        self._counted.images = count

    def margin(self, x: Tensor) -> Tensor:
        return (x * self.w).flatten(1).sum(dim=1) + self.bias

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        margin = self.margin(x)
        return torch.stack([torch.zeros_like(margin), margin], dim=1)


@pytest.fixture
def linear() -> Linear:
    return Linear()


@pytest.fixture
def make_linear() -> Callable[..., Linear]:
    return Linear


@pytest.fixture
def x() -> Tensor:
    """Eight images far enough from 0 and 1 that no ball used here is cut."""
    generator = torch.Generator().manual_seed(1)
    return 0.3 + 0.4 * torch.rand(8, *SHAPE, generator=generator)
