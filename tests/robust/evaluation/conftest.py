"""Models known by hand, and a real one, small enough to train while the tests run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from robust.attacks import AttackSettings, pgd, resolve_attack
from robust.threat_model import ThreatModel

Data = tuple[Tensor, Tensor]
Network = Callable[[], nn.Module]


STAGES = ("apgd-ce-5", "apgd-t-5", "fab-t-5", "square-30")


@pytest.fixture(scope="session")
def short() -> Callable[[ThreatModel], AttackSettings]:
    """Makes AutoAttack with a small budget."""
    return lambda ball: resolve_attack("autoattack", ball, stages=STAGES)


@pytest.fixture(scope="session")
def linear_data() -> Data:
    """Forty images of two classes, far enough from 0 and 1 that no small ball is cut."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(60, 196, (40, 3, 4, 4), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 2, (40,), generator=generator)


@pytest.fixture
def model(make_linear: Callable[..., nn.Module], linear_data: Data) -> nn.Module:
    """A linear model whose boundary runs through the middle of the images."""
    model = make_linear()
    model.bias = 0.05 - model.margin(linear_data[0].float() / 255).median().item()
    return model


@pytest.fixture(scope="session")
def digits() -> tuple[Data, Data]:
    """Real handwritten digits, uint8 (N, 3, 8, 8): those to train on, and 200 to score."""
    values = load_digits()
    images = (torch.from_numpy(values.images) * 255 / 16).round().to(torch.uint8)
    images, labels = images[:, None].expand(-1, 3, -1, -1), torch.from_numpy(values.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[200:], order[:200]
    return (images[train], labels[train]), (images[test], labels[test])


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass is so slow that results are shown or recorded for the time it takes."""
    for name in ("SHOW_SECONDS", "RECORD_SECONDS"):
        monkeypatch.setattr(f"robust.evaluation.stages.{name}", math.inf)


def make_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )


class InFloat64(nn.Module):
    """A float64 network with the inputs and outputs of a float32 one.

    So its float32 logits and gradients depend neither on the batch nor on the processor.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x.double())
        return logits.float()


def train(data: Data, *, eps: float, epochs: int) -> nn.Module:
    """A network trained on digits, against PGD where `eps` is above 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make_network().double()
        model = InFloat64(network)
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        for _ in range(epochs):
            for index in torch.randperm(len(data[0])).split(100):
                x, y = data[0][index].float() / 255, data[1][index]
                if eps:
                    ball = ThreatModel(eps=eps)
                    x = pgd(model, x, y, threat_model=ball, alpha=eps / 2, steps=3).x_adv
                optimizer.zero_grad()
                F.cross_entropy(network(x.double()), y).backward()
                optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def undefended(digits: tuple[Data, Data]) -> nn.Module:
    """Weak, but nothing about it is hidden."""
    return train(digits[0], eps=0.0, epochs=6)


@pytest.fixture(scope="session")
def defended(digits: tuple[Data, Data]) -> nn.Module:
    """Trained against PGD at 24/255."""
    return train(digits[0], eps=24 / 255, epochs=8)


@pytest.fixture(scope="session")
def defended_float32(defended: nn.Module) -> nn.Module:
    """The same weights, for passes in bfloat16 too."""
    network = defended.get_submodule("network")
    return copy.deepcopy(network).float()
