"""Optimizer, learning-rate schedule and precision of a run."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch
from torch import nn

from training.recipe import Phase, Recipe
from training.state import TrainingError


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
    """Rate of step `step` (from 0) of `total`: linear warm-up to the peak, then a cosine.

    It falls to `phase.final_rate` of the peak.
    """
    warmup = round(phase.warmup * total)
    if step < warmup:
        return phase.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    height = 0.5 * (1 + math.cos(math.pi * progress))
    return phase.learning_rate * (phase.final_rate + (1 - phase.final_rate) * height)


def uses_bf16(recipe: Recipe, device: torch.device) -> bool:
    """Whether forward passes run in bfloat16 on this device.

    Raises TrainingError where the recipe asks for it and its gradients would be wrong.
    """
    if recipe.precision == "fp32":
        return False
    if device.type == "cpu" and _shrinks_to_a_pixel(recipe):
        if recipe.precision == "bf16":
            raise TrainingError(
                f"precision: expected fp32 for images of {recipe.input_size} pixels on the CPU, "
                "got bf16, whose gradients are wrong where feature maps are one pixel wide"
            )
        return False
    if recipe.precision == "bf16":
        return True
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if device.type == "cpu":
        return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    return False


def _shrinks_to_a_pixel(recipe: Recipe) -> bool:
    """Whether a strided 3x3 convolution meets a map of one pixel.

    There oneDNN's bfloat16 weight gradient reads memory nobody wrote (torch 2.15 on a CPU with
    AMX: off by up to 1e24, another value each time); 2x2 and 4x4 maps come out right.
    """
    before_last_stage = 16 if recipe.stem == "imagenet" else 4
    return recipe.input_size <= before_last_stage


def autocast(enabled: bool, device: torch.device) -> AbstractContextManager[None]:
    """bfloat16 for convolutions and matrices; weights, images and losses stay in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
