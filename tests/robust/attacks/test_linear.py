"""On a linear model of two classes everything is known: w.x + b falls by eps * dual norm of w."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robust.attack_registry import REGISTRY
from robust.attacks import apgd, apgd_t, fab_t, minimal, resolve_attack, square
from robust.choices import Norm
from robust.threat_model import ThreatModel

NORMS: list[Norm] = ["linf", "l2"]


def ones(x: Tensor) -> Tensor:
    return torch.ones(len(x), dtype=torch.int64)


def dual(w: Tensor, norm: Norm) -> float:
    w = w.detach()
    return float(w.abs().sum() if norm == "linf" else w.norm())


@pytest.fixture
def near(make_linear: Callable[..., nn.Module], x: Tensor) -> nn.Module:
    """Right on all images as class 1, by margins from 0.2 up."""
    model = make_linear()
    model.bias = 0.2 - model.margin(x).min().item()
    return model


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "margin", "pm"])
def test_apgd_lowers_the_margin_by_eps_times_the_dual_norm(
    make_linear: Callable[..., nn.Module], x: Tensor, norm: Norm, loss: str
) -> None:
    # Not so sure of itself that the cross-entropy would be lost in rounding.
    model, eps = make_linear(), 0.03 if norm == "linf" else 0.2
    model.bias = 2.0 - model.margin(x).min().item()
    threat_model = ThreatModel(norm=norm, eps=eps)
    for result in (
        apgd(model, x, ones(x), threat_model=threat_model, loss=loss, steps=40),  # type: ignore[arg-type]
        apgd_t(model, x, ones(x), threat_model=threat_model, steps=40),
    ):
        fall = model.margin(x) - model.margin(result.x_adv)
        torch.testing.assert_close(
            fall, eps * dual(model.w, norm) * torch.ones(8), rtol=1e-3, atol=0
        )
        assert not bool(result.success.any())


@pytest.mark.parametrize("norm", NORMS)
def test_fab_finds_the_smallest_eps(near: nn.Module, x: Tensor, norm: Norm) -> None:
    smallest = near.margin(x) / dual(near.w, norm)
    threat_model = ThreatModel(norm=norm, eps=0.2 if norm == "linf" else 1.0)
    assert smallest.max() < threat_model.eps
    result = fab_t(near, x, ones(x), threat_model=threat_model, early_stop=False)
    assert bool(result.success.all())
    share = result.distance / smallest
    assert share.min() >= 1 - 1e-5
    assert share.max() < 1.01


@pytest.mark.parametrize("norm", NORMS)
def test_minimal_finds_the_smallest_eps(near: nn.Module, x: Tensor, norm: Norm) -> None:
    smallest = near.margin(x) / dual(near.w, norm)
    result = minimal(near, x, ones(x), threat_model=ThreatModel(norm=norm, eps=1.0))
    assert bool(result.success.all())
    assert (result.distance / smallest).min() >= 1 - 1e-5
    assert (result.distance - smallest).max() < 2e-3  # the last of ten halvings of 1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", REGISTRY)
def test_images_beyond_eps_are_never_fooled_and_gradient_attacks_fool_the_rest(
    near: nn.Module, x: Tensor, norm: Norm, name: str
) -> None:
    def model(images: Tensor) -> Tensor:  # with two more classes that no image is near to
        return torch.cat([near(images), torch.full((len(images), 2), -50.0)], dim=1)

    smallest = near.margin(x) / dual(near.w, norm)
    ordered = smallest.detach().sort().values
    stages = ("apgd-ce-20", "apgd-t-20", "fab-t-20", "square-50") if name == "autoattack" else None
    steps = {"square": 50, "apgd-t": 25, "fab-t": 20, "malt": 25}.get(name)
    for eps in (0.99 * ordered[0], (ordered[3] + ordered[4]) / 2, 1.06 * ordered[-1]):
        ball = ThreatModel(norm=norm, eps=float(eps))
        attack = resolve_attack(name, ball, steps=steps, stages=stages)
        result = attack.run(model, x, ones(x))
        assert not bool((result.success & (smallest > eps)).any())
        assert bool((result.distance <= ball.eps + 1e-6).all())
        if attack.uses_gradient and eps > ordered[-1]:
            assert bool(result.success.all())


def test_square_gets_close_without_gradients(
    make_linear: Callable[..., nn.Module], x: Tensor
) -> None:
    model = make_linear()
    with torch.no_grad():
        model.w.copy_(torch.tensor([1.0, -1.0, 0.5]).view(3, 1, 1))  # what squares can follow
    model.bias = 0.2 - model.margin(x).min().item()
    smallest = model.margin(x) / dual(model.w, "linf")
    threat_model = ThreatModel()
    result = square(model, x, ones(x), threat_model=threat_model, eps=1.1 * smallest, queries=400)
    assert bool(result.success.all())
    assert not bool(result.backwards.any())
