"""Models whose answers are known by hand, and one real checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robust.checkpoint import save_checkpoint
from robust.classifier import Architecture, Classifier
from robust.sidecar import Sidecar

SHAPE = (3, 4, 4)


class Linear(nn.Module):
    """Two classes, logits (0, w.x + b): the margin of class 1 is w.x + b. Counts its images."""

    def __init__(self, seed: int = 0, bias: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(SHAPE, generator=generator))
        self.bias = bias
        self.images = 0

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


CLASSES = ("cat", "dog", "frog", "ship")


@pytest.fixture(scope="session")
def make_classifier() -> Callable[..., Classifier]:
    def make(**fields: object) -> Classifier:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            architecture = Architecture(arch="resnet18", num_classes=4, **fields)  # type: ignore[arg-type]
            return Classifier(architecture).eval()

    return make


@pytest.fixture(scope="session")
def checkpoint_path(
    tmp_path_factory: pytest.TempPathFactory, make_classifier: Callable[..., Classifier]
) -> Path:
    """A float16 ResNet-18 of four classes with its sidecar. Not to be written to."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
    classifier = make_classifier()
    save_checkpoint(
        path, classifier, Sidecar(architecture=classifier.architecture, classes=CLASSES)
    )
    return path
