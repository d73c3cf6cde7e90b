"""Attacks on any callable from images float32 (N, C, H, W) in [0, 1] to logits float32 (N, K)."""

from robust.attack_registry import DEFAULT_ATTACKS, REGISTRY
from robust.attacks.api import apgd, apgd_t, fab_t, fgsm, malt, minimal, pgd, pma, square
from robust.attacks.frozen import Model, frozen
from robust.attacks.passes import ModelError
from robust.attacks.result import AttackResult
from robust.attacks.search import Cancelled
from robust.attacks.settings import DEFAULT_EPS, AttackSettings, resolve_attack

ATTACKS = tuple(REGISTRY)

__all__ = [
    "ATTACKS",
    "DEFAULT_ATTACKS",
    "DEFAULT_EPS",
    "AttackResult",
    "AttackSettings",
    "Cancelled",
    "Model",
    "ModelError",
    "apgd",
    "apgd_t",
    "fab_t",
    "fgsm",
    "frozen",
    "malt",
    "minimal",
    "pgd",
    "pma",
    "resolve_attack",
    "square",
]
