"""Attacks on any callable from images float32 (N, C, H, W) in [0, 1] to logits float32 (N, K)."""

from robust.attacks.frozen import Model, frozen
from robust.attacks.pgd import fgsm, pgd
from robust.attacks.result import AttackResult
from robust.attacks.settings import (
    ATTACKS,
    DEFAULT_ATTACKS,
    DEFAULT_EPS,
    AttackSettings,
    resolve_attack,
)

__all__ = [
    "ATTACKS",
    "DEFAULT_ATTACKS",
    "DEFAULT_EPS",
    "AttackResult",
    "AttackSettings",
    "Model",
    "fgsm",
    "frozen",
    "pgd",
    "resolve_attack",
]
