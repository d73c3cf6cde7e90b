from typing import Any

import pytest

from training.monitor import warnings_for


def row(pgd: float, fgsm: float | None = None, adversarial: bool = True) -> dict[str, Any]:
    fgsm = pgd + 0.05 if fgsm is None else fgsm
    return {"pgd": pgd, "fgsm": fgsm, "adversarial": adversarial, "n": 100}


def test_healthy_run_gives_no_warning() -> None:
    assert warnings_for([row(0.1), row(0.2), row(0.3), row(0.29)]) == []


def test_gap_between_fgsm_and_pgd_is_catastrophic_overfitting() -> None:
    (message,) = warnings_for([row(0.30), row(0.02, fgsm=0.6)])
    assert message.startswith("collapse: FGSM accuracy is 58.0 points above")


def test_lasting_decline_is_robust_overfitting() -> None:
    falling = [row(0.40), row(0.36), row(0.35), row(0.34)]
    (message,) = warnings_for(falling)
    assert message.startswith("robust overfitting: PGD-10 accuracy")
    assert warnings_for(falling[:3]) == []


def test_clean_phase_is_not_reported_as_collapse() -> None:
    assert warnings_for([row(0.0, fgsm=0.4, adversarial=False)]) == []


@pytest.mark.parametrize("gap", [0.149, 0.151])
def test_the_threshold_is_fifteen_points(gap: float) -> None:
    assert bool(warnings_for([row(0.3, fgsm=0.3 + gap)])) == (gap > 0.15)


def test_epochs_without_a_score_give_no_warning() -> None:
    unscored = {"pgd": None, "fgsm": None, "adversarial": True, "n": 0}
    falling = [row(0.40), row(0.36), unscored, row(0.35), unscored, row(0.34)]
    assert len(warnings_for(falling)) == 1
    assert warnings_for([*falling, unscored]) == []
