"""On a linear model of two classes everything is known: w.x + b falls by eps * dual norm of w."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robust.attacks import apgd, apgd_t, fab_t, minimal, square
from robust.geometry import Norm
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
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_apgd_lowers_the_margin_by_all_it_can(
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
def test_every_attack_is_exact_about_what_can_be_fooled(
    near: nn.Module, x: Tensor, norm: Norm
) -> None:
    """At 0.99 of the smallest eps none may succeed, at 1.05 of it the white-box ones must."""
    smallest = near.margin(x) / dual(near.w, norm)
    for attack in (apgd, apgd_t, fab_t, minimal, square):
        for share, expected in ((0.99, False), (1.06, True)):
            if attack is square and expected:
                continue
            result = attack(
                near,
                x,
                ones(x),
                threat_model=ThreatModel(norm=norm),
                eps=share * smallest,
                **{"queries": 100} if attack is square else {},
            )
            assert result.success.tolist() == [expected] * 8, (attack, share)
            assert bool((result.distance <= share * smallest + 1e-6).all())


def test_square_gets_near_without_a_gradient(
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
