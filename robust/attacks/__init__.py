"""Attacks on any callable from images float32 (N, C, H, W) in [0, 1] to logits float32 (N, K)."""

from robust.attacks.apgd import apgd, apgd_t
from robust.attacks.fab import fab_t
from robust.attacks.frozen import Model, frozen
from robust.attacks.minimal import minimal
from robust.attacks.passes import ModelError
from robust.attacks.pgd import fgsm, pgd
from robust.attacks.result import AttackResult
from robust.attacks.search import GivenUp
from robust.attacks.settings import (
    ATTACKS,
    AUTOATTACK,
    DEFAULT_ATTACKS,
    DEFAULT_EPS,
    AttackSettings,
    resolve_attack,
)
from robust.attacks.square import square

__all__ = [
    "ATTACKS",
    "AUTOATTACK",
    "DEFAULT_ATTACKS",
    "DEFAULT_EPS",
    "AttackResult",
    "AttackSettings",
    "GivenUp",
    "Model",
    "ModelError",
    "apgd",
    "apgd_t",
    "fab_t",
    "fgsm",
    "frozen",
    "minimal",
    "pgd",
    "resolve_attack",
    "square",
]
