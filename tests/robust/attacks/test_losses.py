import pytest
import torch

from robust.attacks.losses import (
    classes_needed,
    cross_entropy,
    dlr,
    logit_gap,
    margin,
    probability_margin,
    targeted_dlr,
)

LOGITS = torch.tensor([[1.0, 4.0, 2.0, 0.5]])


def at(index: int) -> torch.Tensor:
    return torch.tensor([index])


def test_dlr_by_hand() -> None:
    assert dlr(LOGITS, at(1)).item() == pytest.approx(-(4 - 2) / (4 - 1))
    assert dlr(LOGITS, at(2)).item() == pytest.approx(-(2 - 4) / (4 - 1))
    assert dlr(LOGITS, at(3)).item() == pytest.approx(-(0.5 - 4) / (4 - 1))
    assert dlr(LOGITS, at(1), at(0)).item() == pytest.approx(-(4 - 1) / (4 - (1 + 0.5) / 2))
    assert dlr(LOGITS, at(2), at(1)).item() == pytest.approx(-(2 - 4) / (4 - (1 + 0.5) / 2))


def test_dlr_does_not_change_with_scale_or_shift() -> None:
    for target in (None, at(3)):
        scaled = dlr(100 * LOGITS - 7, at(1), target)
        torch.testing.assert_close(scaled, dlr(LOGITS, at(1), target))


def test_margin_is_positive_exactly_when_the_attack_succeeds() -> None:
    assert margin(LOGITS, at(1)).item() == -2
    assert margin(LOGITS, at(0)).item() == 3
    assert margin(LOGITS, at(0), at(1)).item() == 2
    assert margin(LOGITS, at(1), at(2)).item() == -2


def test_probability_margin_is_that_of_the_softmax() -> None:
    p = LOGITS.softmax(dim=1)[0]
    assert probability_margin(LOGITS, at(1)).item() == pytest.approx(float(p[2] - p[1]))
    assert probability_margin(LOGITS, at(0), at(3)).item() == pytest.approx(float(p[3] - p[1]))
    assert classes_needed("pm", targeted=True) == 2


def test_losses_of_a_target_class() -> None:
    assert logit_gap(LOGITS, at(1), at(2)).item() == -2
    assert torch.equal(targeted_dlr(LOGITS, at(1), at(2)), dlr(LOGITS, at(1), at(2)))
    few = LOGITS[:, :3]  # the ratio needs 4
    assert torch.equal(targeted_dlr(few, at(1), at(2)), margin(few, at(1), at(2)))


def test_targeted_cross_entropy_rises_toward_the_target() -> None:
    logits = LOGITS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(logits, at(1), at(3)).sum(), logits)
    assert gradient[0, 3] > 0
    assert bool((gradient[0, :3] < 0).all())


def test_classes_needed() -> None:
    assert classes_needed("dlr", targeted=False) == 3
    assert classes_needed("dlr", targeted=True) == 4
    assert classes_needed("ce", targeted=True) == classes_needed("margin", targeted=False) == 2
