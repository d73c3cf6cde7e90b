"""MALT on a linear model, where its linear extrapolation is exact."""

import pytest
import torch
from torch import Tensor

from robust.attacks import apgd_t, resolve_attack
from robust.attacks.malt import MALT
from robust.attacks.run import run_algorithm
from robust.choices import Norm
from robust.threat_model import ThreatModel

NORMS: list[Norm] = ["linf", "l2"]
CLASSES = 5
LIKELIEST, CLOSEST = 1, 4


class Linear:
    """The likelier another class than 0 is, the less its logit depends on the image."""

    def __init__(self, x: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        scale = torch.tensor([0.0, 0.1, 0.3, 1.0, 9.0]).view(-1, 1, 1, 1)
        self.w = scale * torch.randn(CLASSES, *x.shape[1:], generator=generator)
        gaps = torch.tensor([0.0, 1.0, 1.3, 1.6, 2.0])
        self.b = -gaps - (self.w * x.mean(dim=0)).flatten(1).sum(dim=1)

    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.w.flatten(1).T + self.b

    def radii(self, x: Tensor, norm: Norm) -> Tensor:
        """The smallest eps that reaches each class, (N, K)."""
        logits, w = self(x), (self.w - self.w[0]).flatten(1)
        dual = w.abs().sum(dim=1) if norm == "linf" else w.norm(dim=1)
        return (logits[:, :1] - logits) / dual


@pytest.fixture
def images(x: Tensor) -> Tensor:
    return 0.5 + (x - x.mean(dim=0)) / 1000  # nearly the same: all have the same closest class


@pytest.mark.parametrize("norm", NORMS)
def test_first_target_is_the_closest_class_not_the_likeliest(images: Tensor, norm: Norm) -> None:
    model, y = Linear(images), torch.zeros(8, dtype=torch.int64)
    radii = model.radii(images, norm)[:, 1:]
    assert bool((radii.argmin(dim=1) + 1 == CLOSEST).all())
    assert bool((model(images)[:, 1:].argmax(dim=1) + 1 == LIKELIEST).all())
    ball = ThreatModel(norm=norm, eps=1.05 * float(radii.amin(dim=1).max()))
    assert ball.eps < 0.5 * float(radii[:, :-1].min())  # no other class can be reached
    algorithm = MALT(norm=norm, steps=20)
    found = run_algorithm(model, algorithm, images, y, threat_model=ball)
    assert bool(found.success.all())
    assert found.logits.argmax(dim=1).tolist() == [CLOSEST] * 8
    likeliest = apgd_t(model, images, y, threat_model=ball, targets=1, steps=20)
    assert not bool(likeliest.success.any())


@pytest.mark.parametrize("norm", NORMS)
def test_estimate_is_the_smallest_eps_of_each_class(images: Tensor, norm: Norm) -> None:
    model, seen = Linear(images), []

    class Watched(MALT):
        def advance(self, rows, *rest):  # type: ignore[no-untyped-def]
            done = super().advance(rows, *rest)
            seen.append((rows.state.candidates.clone(), rows.state.radii.clone()))
            return done

    ball = ThreatModel(norm=norm, eps=1e-4)
    y = torch.zeros(8, dtype=torch.int64)
    result = run_algorithm(model, Watched(norm=norm, steps=1), images, y, threat_model=ball)
    assert not bool(result.success.any())
    candidates, radii = seen[-1]
    assert candidates.tolist() == [[1, 2, 3, 4]] * 8
    torch.testing.assert_close(radii, model.radii(images, norm)[:, 1:], rtol=1e-3, atol=0)


def test_targets_are_attacked_in_order_up_to_their_number(images: Tensor) -> None:
    model, y = Linear(images), torch.zeros(8, dtype=torch.int64)
    ball = ThreatModel(eps=1e-4)
    spent = []
    for targets in (1, 3, 9):
        algorithm = MALT(norm="linf", steps=4, targets=targets)
        result = run_algorithm(model, algorithm, images, y, threat_model=ball)
        assert not bool(result.success.any())
        assert bool((result.distance <= ball.eps + 1e-6).all())
        spent.append(int((result.forwards + result.backwards).sum()) / 8)
    measuring = 1 + 2 * (CLASSES - 1)
    assert spent == [measuring + runs * 9 for runs in (1, 3, 4)]


def test_its_settings() -> None:
    attack = resolve_attack("malt-50", ThreatModel())
    algorithm = attack.algorithm()
    assert isinstance(algorithm, MALT)
    assert (algorithm.targets, algorithm.steps, algorithm.runs) == (3, 50, 1)
    assert attack.cost == 1 + 2 * 100 + 3 * 101
    with pytest.raises(ValueError, match="targets as a whole number of at least 1, got 0"):
        MALT(norm="linf", steps=1, targets=0)
