import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robust.attacks import AttackSettings, resolve_attack
from robust.threat_model import ThreatModel

EPS = 8 / 255
LINF = ThreatModel(eps=EPS)


def ones(x: Tensor) -> Tensor:
    return torch.ones(len(x), dtype=torch.int64)


def test_defaults_are_filled_in() -> None:
    assert resolve_attack("pgd", LINF) == AttackSettings(
        name="pgd",
        threat_model=LINF,
        alpha=EPS / 4,
        steps=20,
        restarts=1,
        random_start=True,
        seed=0,
    )
    settings = resolve_attack("fgsm", LINF, seed=5)
    assert (settings.alpha, settings.steps, settings.random_start) == (EPS, 1, False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("pgd", False), ("pgd-margin", False), ("apgd-ce", True), ("square", True), ("audit", True)],
)
def test_only_pgd_can_start_at_the_image(name: str, expected: bool) -> None:
    assert resolve_attack(name, LINF, random_start=False).random_start == expected


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 50])
def test_default_steps_cross_the_ball(steps: int) -> None:
    settings = resolve_attack(f"pgd-{steps}", LINF)
    assert settings.alpha <= EPS
    assert settings.steps * settings.alpha >= min(2.5, steps) * EPS - 1e-9


def test_labels_and_costs() -> None:
    assert resolve_attack("fgsm", LINF).label == "fgsm"
    assert resolve_attack("pgd", LINF).label == "pgd-20"
    assert resolve_attack("pgd-50", LINF, restarts=5).label == "pgd-50x5"
    assert resolve_attack("fgsm", LINF).cost == 3
    assert resolve_attack("pgd-50", LINF, restarts=5).cost == 505


@pytest.mark.parametrize("name", ["", "pgd-", "pgd-x", "fgsm-3", "cw", "pgd-1234567", "a b"])
def test_unknown_attacks_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected attack to be one of fgsm, pgd"):
        resolve_attack(name, LINF)


@pytest.mark.parametrize(
    ("name", "label"),
    [("PGD", "pgd-20"), ("AutoAttack", "autoattack"), ("Pgd-5", "pgd-5"), ("APGD", "apgd-ce")],
)
def test_names_are_read_in_any_case(name: str, label: str) -> None:
    assert resolve_attack(name, LINF).label == label


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("pgd20", "pgd-20"),
        ("PGD_20", "pgd-20"),
        ("aa", "autoattack"),
        ("auto-attack", "autoattack"),
        ("apgdce", "apgd-ce"),
        ("apgd20", "apgd-20"),
        ("fgsm-3", "fgsm"),
        ("fab", "fab-t"),
    ],
)
def test_the_closest_name_is_suggested(name: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"got {name!r}; did you mean {re.escape(meant)}\\?$"):
        resolve_attack(name, LINF)
    assert resolve_attack(meant, LINF)
    with pytest.raises(ValueError, match=r"got 'cw'$"):
        resolve_attack("cw", LINF)


@pytest.mark.parametrize("changes", [{"steps": 0}, {"restarts": -1}])
def test_settings_out_of_range_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="whole number of at least 1"):
        resolve_attack("pgd", LINF, **changes)  # type: ignore[arg-type]


def test_cost_equals_the_passes_spent(make_linear: Callable[..., nn.Module], x: Tensor) -> None:
    model = make_linear(bias=1000.0)  # nothing fools it
    settings = resolve_attack("pgd-4", LINF, restarts=3)
    result = settings.run(model, x, ones(x))
    assert set((result.forwards + result.backwards).tolist()) == {settings.cost}
