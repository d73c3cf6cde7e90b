"""Reasons not to trust the numbers of an evaluation.

An attack that fails says little about the model: its gradients may be masked. What shows that
from the outside is told here. Source: Athalye et al. 2018, arXiv:1802.00420.
"""

from __future__ import annotations

from robust.attacks import AttackSettings
from robust.evaluation import Accuracy, Evaluation

FEWEST = 20  # images right when clean, below which nothing is concluded
# Budgets from which on some image of any known model gives way.
LEAST_EPS = {"linf": 2 / 255, "l2": 0.25}


def doubts(evaluation: Evaluation) -> tuple[str, ...]:
    """One sentence for each reason; none where the numbers look sound."""
    if evaluation.clean.correct < FEWEST:
        return ()
    found = []
    for item in evaluation.attacks:
        attack = _settings(item)
        threat_model = attack.threat_model
        if (
            item.correct == evaluation.clean.correct
            and threat_model.eps >= LEAST_EPS[threat_model.norm]
        ):
            found.append(
                f"{item.label} fooled none of {evaluation.clean.correct} images: "
                "unless this data is that easy, gradients are masked and the accuracy is no bound"
            )
    for weak in evaluation.attacks:
        for strong in evaluation.attacks:
            if _single_step(weak) and not _single_step(strong) and _same_ball(weak, strong):
                gap = strong.correct - weak.correct
                if gap > max(2, evaluation.n // 100):
                    found.append(
                        f"{strong.label} leaves {gap} more images right than the single step of "
                        f"{weak.label}: gradients are likely masked"
                    )
    return tuple(found)


def _settings(item: Accuracy) -> AttackSettings:
    assert item.attack is not None
    return item.attack


def _single_step(item: Accuracy) -> bool:
    return _settings(item).steps == 1


def _same_ball(one: Accuracy, other: Accuracy) -> bool:
    return _settings(one).threat_model == _settings(other).threat_model
