"""What every attack is called with, and where."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust.attacks import (
    AttackResult,
    apgd,
    apgd_t,
    fab_t,
    fgsm,
    malt,
    minimal,
    pgd,
    pma,
    resolve_attack,
    square,
)
from robust.threat_model import ThreatModel

BALL = ThreatModel(eps=8 / 255)

Attack = Callable[..., AttackResult]

ALL: dict[str, Attack] = {
    "fgsm": fgsm,
    "pgd": partial(pgd, alpha=0.01, steps=2),
    "apgd": partial(apgd, steps=4),
    "apgd_t": partial(apgd_t, steps=4),
    "fab_t": partial(fab_t, steps=2),
    "square": partial(square, queries=5),
    "minimal": partial(minimal, steps=2),
    "malt": partial(malt, steps=2),
    "pma": partial(pma, steps=4),
}
attacks = pytest.mark.parametrize("run", ALL.values(), ids=ALL)


@attacks
def test_result_is_the_same_in_inference_mode(
    curved: nn.Module, images: Tensor, run: Attack
) -> None:
    y = curved(images).argmax(dim=1)
    outside = run(curved, images, y, threat_model=BALL)
    with torch.inference_mode():
        x = images.clone()
        assert x.is_inference()
        inside = run(curved, x, curved(x).argmax(dim=1), threat_model=BALL)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(inside.x_adv, outside.x_adv)
    assert torch.equal(inside.success, outside.success)


def test_autoattack_works_in_inference_mode(curved: nn.Module, images: Tensor) -> None:
    stages = ("apgd-ce-3", "apgd-t-3", "fab-t-3", "square-20")
    small = resolve_attack("autoattack", ThreatModel(eps=0.05), stages=stages)
    x = images[:2]
    outside = small.run(curved, x, curved(x).argmax(dim=1))
    with torch.inference_mode():
        inside = small.run(curved, x.clone(), curved(x).argmax(dim=1))
    assert torch.equal(inside.x_adv, outside.x_adv)


@attacks
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": 8 / 255}, r"expected eps float \(12,\), one for each image .*, got a float"),
        ({"eps": torch.zeros(5)}, r"expected eps float \(12,\).* got torch.float32 \(5,\)"),
        ({"eps": torch.full((12,), 2.0)}, "expected eps from 0 to 1, got 2 to 2"),
        ({"y": [0] * 12}, r"expected labels int64 \(12,\), got a list"),
        ({"x": [[0.5]]}, r"expected float images \(N, C, H, W\), got a list"),
    ],
)
def test_mismatched_inputs_are_rejected(
    curved: nn.Module, images: Tensor, run: Attack, change: dict[str, Any], message: str
) -> None:
    asked: dict[str, Any] = {"x": images, "y": curved(images).argmax(dim=1)} | change
    with pytest.raises(ValueError, match=message):
        run(curved, asked.pop("x"), asked.pop("y"), threat_model=BALL, **asked)


@pytest.mark.parametrize(
    ("attack", "change", "message"),
    [
        (minimal, {"steps": 0}, "expected steps as a whole number of at least 1, got 0"),
        (minimal, {"rounds": -1}, "expected rounds as a whole number of at least 0, got -1"),
        (apgd, {"steps": 2.5}, "expected steps as a whole number of at least 1, got 2.5"),
        (apgd, {"loss": "cw"}, "expected loss to be one of ce, margin, dlr, pm, got 'cw'"),
        (apgd_t, {"targets": 0}, "expected targets as a whole number"),
        (fab_t, {"targets": True}, "expected targets as a whole number"),
        (square, {"queries": "9"}, "expected queries as a whole number of at least 1, got '9'"),
        (square, {"seed": 2**64}, "expected a seed that fits 64 bits"),
    ],
)
def test_meaningless_settings_are_rejected(
    curved: nn.Module, images: Tensor, attack: Attack, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        attack(curved, images, curved(images).argmax(dim=1), threat_model=BALL, **change)
