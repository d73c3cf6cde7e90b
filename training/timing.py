"""Times the parts of a run on this machine, for ``--minutes``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch

from robust.images import to_float
from training.budget import Costs
from training.data import TrainingData
from training.recipe import Phase, Recipe
from training.scoring import final_score
from training.state import RunState
from training.step import Trainer


def time_costs(
    trainer: Trainer, data: TrainingData, recipe: Recipe, clock: Callable[[], float]
) -> Costs:
    """The costs, from a few steps of each phase and part of a score; restores the trainer."""
    before = RunState()
    trainer.fill_state(before)
    before = copy.deepcopy(before)
    timed = [
        _time_step(trainer, data, phase, clock) if phase.epochs else (0.0, 1.0)
        for phase in recipe.phases
    ]
    trainer.load_state(before)
    trainer.reset_optimizer()
    held_out = len(data.held_images)
    count = min(held_out, 64 if trainer.device.type == "cpu" else 250)
    image = _time_score(trainer, data, count, clock) / count
    return Costs(
        steps=len(data.images) // recipe.batch_size,
        step=tuple(seconds for seconds, _ in timed),
        awp=tuple(ratio for _, ratio in timed),
        # Passes per image: 1 clean, 3 of FGSM and 21 of PGD-10, against 41 of PGD-20.
        score=image * len(data.monitored) * 25 / 45,
        finish=image * held_out,
    )


def _time_step(
    trainer: Trainer, data: TrainingData, phase: Phase, clock: Callable[[], float]
) -> tuple[float, float]:
    """Mean seconds per step of the phase, and the ratio of a step with AWP to one without.

    Each is the median of four after a warm-up. The ratio is 1 if all steps are of one kind.
    """
    n, generator = trainer.recipe.batch_size, torch.Generator(trainer.device).manual_seed(0)

    def seconds(awp: float) -> float:
        times = []
        for _ in range(5):
            began = clock()
            loss = trainer.step(
                data.images[:n],
                data.labels[:n],
                phase=phase,
                learning_rate=0.0,
                awp=awp,
                generator=generator,
            )
            loss.item()  # waits for the device
            times.append(clock() - began)
        return median(times[1:])

    if not phase.awp or not phase.awp_from:
        return seconds(phase.awp), 1.0
    plain = seconds(0.0)
    ratio = max(1.0, seconds(phase.awp) / plain)
    return plain * (phase.awp_from + (1 - phase.awp_from) * ratio), ratio


def _time_score(
    trainer: Trainer, data: TrainingData, count: int, clock: Callable[[], float]
) -> float:
    """Seconds of the final scoring of `count` images if none is fooled."""
    model, images = trainer.averaged.module, data.held_images[:count]
    with torch.no_grad():
        labels = model(to_float(images.to(trainer.device))).argmax(dim=1).cpu()
    tiny = replace(trainer.threat_model, eps=1e-6)
    began = clock()
    final_score(trainer, images, labels, threat_model=tiny)
    return clock() - began
