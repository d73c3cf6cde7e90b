"""`minimal` where results are 8-bit images: a rounded minimum must not lose the success."""

import math
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from robust.attacks import resolve_attack
from robust.choices import Norm
from robust.images import to_float, to_uint8
from robust.prediction import AttackOutcome, attack_images, predict
from robust.threat_model import ThreatModel


def run(
    model: nn.Module, x: Tensor, name: str, ball: ThreatModel, bf16: nn.Module | None = None
) -> list[AttackOutcome]:
    """Attack the images uint8 (N, 3, H, W) away from their predictions, and check the results."""
    before = predict(model, to_float(x))
    labels = before.argmax(dim=1).tolist()
    settings = resolve_attack(name, ball)
    outcomes = attack_images(model, x, labels, settings=settings, before=before, bf16=bf16)
    for outcome, image, label in zip(outcomes, x, labels, strict=True):
        after = predict(model, to_float(outcome.image)[None])[0]
        assert outcome.success == (int(after.argmax()) != label)
        change = (outcome.image.double() - image.double()) / 255
        found = change.abs().max() if ball.norm == "linf" else change.norm()
        assert float(found) <= ball.eps * (1 + 1e-6)
        assert outcome.forwards + outcome.backwards <= settings.cost + 2
    return outcomes


def margins(model: nn.Module, images: Tensor) -> list[float]:
    """By how much the linear model prefers class 1, for each image uint8 (N, 3, H, W)."""
    with torch.no_grad():
        return model.margin(to_float(images)).tolist()


@pytest.fixture
def near(make_linear: Callable[..., nn.Module], x: Tensor) -> nn.Module:
    """Predicts class 1 for all images, by margins from 0.05 up."""
    model = make_linear()
    model.bias = 0.05 - model.margin(to_float(to_uint8(x))).min().item()
    return model


def smallest_levels(model: nn.Module, images: Tensor) -> list[int]:
    """The smallest k for which a change of k/255 of every pixel fools the linear model."""
    per_level = float(model.w.detach().abs().sum()) / 255
    return [math.ceil(margin / per_level) for margin in margins(model, images)]


def test_smallest_level_is_found_on_a_linear_model(near: nn.Module, x: Tensor) -> None:
    images = to_uint8(x)
    levels = smallest_levels(near, images)
    assert len(set(levels)) > 2
    outcomes = run(near, images, "minimal", ThreatModel(eps=max(levels) / 255))
    assert all(outcome.success for outcome in outcomes)
    assert [outcome.linf * 255 for outcome in outcomes] == pytest.approx(levels)


@pytest.mark.parametrize("in_bf16", [False, True])
def test_point_on_the_boundary_is_pushed_outward(near: nn.Module, x: Tensor, in_bf16: bool) -> None:
    images = to_uint8(x)
    levels = smallest_levels(near, images)
    bf16 = deepcopy(near) if in_bf16 else None
    outcomes = run(near, images, "fab-t", ThreatModel(eps=max(levels) / 255), bf16)
    assert all(outcome.success for outcome in outcomes)


def test_eps_between_two_levels_means_the_lower_one(near: nn.Module, x: Tensor) -> None:
    images = to_uint8(x)
    levels = smallest_levels(near, images)
    middle = sorted(levels)[3]
    outcomes = run(near, images, "minimal", ThreatModel(eps=(middle + 0.7) / 255))
    expected = [level <= middle for level in levels]
    assert 3 < sum(expected) < len(expected)
    assert [outcome.success for outcome in outcomes] == expected


def shortest(w: Tensor, margins: list[float], most: int = 4000) -> list[int]:
    """The least sum of squares of whole numbers z with <w, z> above each margin, one by one."""
    best = torch.zeros(most, dtype=torch.float64)  # the largest <w, z>, by the sum of squares
    for weight in w.detach().flatten().abs().double().tolist():
        with_one = best.clone()
        for level in range(1, int(most**0.5) + 1):
            square = level * level
            with_one[square:] = with_one[square:].maximum(best[: most - square] + weight * level)
        best = with_one
    return [int((best > margin).nonzero()[0]) for margin in margins]


def test_nearly_closest_l2_image_is_found_on_a_linear_model(near: nn.Module, x: Tensor) -> None:
    images = to_uint8(x)
    expected = shortest(near.w, [255 * margin for margin in margins(near, images)])
    outcomes = run(near, images, "minimal", ThreatModel(norm="l2", eps=0.5))
    found = [(outcome.l2 * 255) ** 2 for outcome in outcomes]
    assert all(outcome.success for outcome in outcomes)
    assert min(expected) < 10 < 3000 < max(expected)
    for square, least in zip(found, expected, strict=True):
        assert least - 1e-3 <= square <= 1.1 * least


def convolutional(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 9, 10),
    ).eval()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_minimal_fools_every_image_pgd_fools_at_no_larger_distance(norm: Norm) -> None:
    model = convolutional(0)
    x = torch.randint(0, 256, (20, 3, 16, 16), generator=torch.Generator().manual_seed(1))
    ball = ThreatModel(norm=norm, eps=4 / 255 if norm == "linf" else 0.2)
    pgd, minimal = (run(model, x.to(torch.uint8), name, ball) for name in ("pgd-20", "minimal"))
    fooled = [place for place, outcome in enumerate(pgd) if outcome.success]
    assert 5 < len(fooled) < 20
    closer = 0
    for place in fooled:
        assert minimal[place].success
        there, here = ((each.linf, each.l2)[norm == "l2"] for each in (pgd[place], minimal[place]))
        assert here <= there
        closer += here < there
    assert closer > 2


class Flat(nn.Module):
    """Has no gradient at the image itself, where the search of `minimal` starts."""

    def __init__(self, image: Tensor, margin: float) -> None:
        super().__init__()
        self.image, self.margin = to_float(image), margin

    def forward(self, x: Tensor) -> Tensor:
        change = (x - self.image).flatten(1)[:, :11].sum(dim=1).abs()
        return torch.stack([torch.full_like(change, 0), change - self.margin], dim=1)


def test_images_only_pgd_fools_are_kept_and_moved_closer() -> None:
    image = torch.full((3, 4, 4), 128, dtype=torch.uint8)
    model = Flat(image, margin=11 * 4.5 / 255)
    for name, levels in (("pgd-20", 8), ("minimal", 5)):
        (outcome,) = run(model, image[None], name, ThreatModel())
        assert outcome.success
        assert outcome.linf * 255 == pytest.approx(levels)


def test_python_api_minimal_is_not_rounded_to_8_bits(near: nn.Module, x: Tensor) -> None:
    images = to_uint8(x)
    y = torch.ones(len(x), dtype=torch.int64)
    result = resolve_attack("minimal", ThreatModel(eps=0.1)).run(near, to_float(images), y)
    total = float(near.w.detach().abs().sum())
    smallest = torch.tensor(margins(near, images)) / total
    over = (result.distance - smallest)[result.success] * 255
    assert len(over) > 4
    assert float(over.max()) < 0.05  # of a level
