"""The state of a training run, and what happens at the ends of its epochs."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robust import files
from robust.environment import versions
from training.budget import Budget, with_epochs
from training.data import TrainingData
from training.ema import refresh_norms
from training.monitor import Board, Observer, Progress, warnings_for, write_metrics
from training.optimizer import learning_rate
from training.recipe import Phase, Recipe
from training.result import keep_if_best
from training.scoring import score
from training.state import RunFolder, RunState, StateWriter
from training.step import Trainer

logger = logging.getLogger(__name__)

FEW_STEPS = 50  # of an epoch, below which batch-norm statistics are computed anew
GPU_STEPS = 10  # between readings of the loss, which synchronize with the GPU


@dataclass(kw_only=True)
class Run:
    """A training run: its recipe, data, trainer, files and position."""

    recipe: Recipe
    seed: int
    data: TrainingData
    trainer: Trainer
    state: RunState
    folder: RunFolder
    manifest: dict[str, Any]
    writer: StateWriter
    should_stop: Callable[[], bool]
    observe: Observer
    board: Board | None = None  # only on rank 0
    budget: Budget | None = None  # with `--minutes`
    unread: list[Tensor] = field(default_factory=list)  # losses of the last steps, on the device

    def __post_init__(self) -> None:
        self.steps = len(self.data.images) // self.recipe.batch_size  # per epoch
        self.began = time.monotonic() - self.state.seconds
        self.saved = time.monotonic()
        on_cpu = self.trainer.device.type == "cpu"
        self.check_every = 1 if on_cpu else GPU_STEPS

    @property
    def is_rank0(self) -> bool:
        """Whether this process writes the files."""
        return self.trainer.collectives.world.is_rank0

    @property
    def phase(self) -> Phase:
        """The current phase."""
        return self.recipe.phases[self.state.phase]

    @property
    def phase_steps(self) -> int:
        """Steps of the current phase."""
        return self.state.phase_steps or self.phase.epochs * self.steps

    @property
    def epoch_steps(self) -> int:
        """Steps of the current epoch: with `--minutes`, the last one of a phase may have fewer."""
        return min(self.steps, self.phase_steps - self.state.epoch * self.steps)

    @property
    def done(self) -> int:
        """Steps of the current phase that are done."""
        return self.state.epoch * self.steps + self.state.step

    @property
    def losses_read(self) -> int:
        """Steps of the current epoch whose losses are in its sum."""
        return self.state.step - len(self.unread)

    @property
    def epochs(self) -> int:
        """Epochs of all phases, with the current one as fitted by `--minutes`."""
        current = -(-self.phase_steps // self.steps)
        return self.recipe.epochs - self.phase.epochs + current

    def learning_rate(self, step: int) -> float:
        """The learning rate at a step of the current phase, counted from 0."""
        return learning_rate(self.phase, step, self.phase_steps)

    def generator(self, *, step: int, device: torch.device | str) -> torch.Generator:
        """A generator that depends only on seed and position, so that resuming is exact.

        `step` counts from 1 within the epoch; 0 is for the epoch itself.
        """
        mixed = 0
        for number in (self.seed, self.state.phase, self.state.epoch, step):
            mixed = (mixed * 1_000_003 + number + 1) % (2**63 - 25)
        return torch.Generator(device).manual_seed(mixed)


def begin_files(run: Run) -> Board:
    """Write the run's files to match its state; returns its TensorBoard writer."""
    if not run.state.model:
        archive = run.folder.archive_previous_run()
        if archive is not None:
            logger.info("what the run before left at %s is kept in %s", run.folder.out, archive)
    write_manifest(run)
    write_metrics(run.folder.metrics, run.state.history)
    return Board(run.folder.tensorboard, done=len(run.state.history))


def write_manifest(run: Run) -> None:
    """Write `run.json`, with the current recipe."""
    run.manifest["recipe"] = run.recipe.to_dict()
    if run.is_rank0:
        files.write_json(run.folder.manifest, {**run.manifest, "versions": versions()})


def end_epoch(run: Run, rate: float, speed: float) -> dict[str, Any]:
    """Score the averaged model if due and keep it if it is the best; returns the metrics."""
    state, recipe, phase = run.state, run.recipe, run.phase
    trained = time.monotonic() - run.began
    clock = time.monotonic if run.budget is None else run.budget.deadline.clock
    began = clock()
    scored = run.done == run.phase_steps or (state.epoch + 1) % recipe.score_every == 0
    accuracies: dict[str, float | None] = dict.fromkeys(("clean", "fgsm", "pgd"))
    if scored:
        if run.steps < FEW_STEPS:
            refresh_norms(run.trainer.averaged.module, run.data.images, recipe.batch_size)
        accuracies.update(
            score(
                run.trainer,
                run.data.held_images[run.data.monitored],
                run.data.held_labels[run.data.monitored],
            )
        )
    state.seconds = time.monotonic() - run.began
    if scored and run.budget is not None:
        run.budget.scored(clock() - began)
    row: dict[str, Any] = {
        "epoch": len(state.history) + 1,
        "phase": phase.name,
        "adversarial": phase.is_adversarial,
        "loss": state.epoch_loss / state.step,
        "learning_rate": rate,
        **accuracies,
        "n": len(run.data.monitored) if scored else 0,
        "images_per_second": speed,
        "seconds": state.seconds,
        "scoring_seconds": state.seconds - trained,
    }
    state.history.append(row)
    for message in warnings_for(state.history):
        logger.warning("epoch %d: %s", row["epoch"], message)
    later = (item for item in recipe.phases[state.phase + 1 :] if item.epochs)
    if scored and (phase.is_adversarial or not any(item.is_adversarial for item in later)):
        keep_if_best(state, row, run.trainer.averaged.module, select=recipe.select)
    if run.board is not None:
        run.board.add(row)
        write_metrics(run.folder.metrics, state.history)
    return row


def end_fitted(run: Run) -> None:
    """Record the fitted number of steps of a phase, and its epochs; the last may be partial."""
    epochs = [phase.epochs for phase in run.recipe.phases]
    logger.info(
        "--minutes: the phase %s had %d steps instead of %d, as its steps were slower or faster",
        run.phase.name,
        run.phase_steps,
        run.phase.epochs * run.steps,
    )
    epochs[run.state.phase] = run.state.epoch
    run.manifest["minutes"]["fitted_steps"][run.phase.name] = run.phase_steps
    run.recipe = with_epochs(run.recipe, epochs)
    write_manifest(run)


def progress(run: Run, rate: float, speed: float, row: dict[str, Any] | None = None) -> Progress:
    """Progress of the run, for a display."""
    state, phase = run.state, run.phase
    later = run.recipe.phases[state.phase + 1 :]
    steps = float(run.phase_steps - run.done)
    # Steps of later phases count in proportion to their passes.
    steps += sum(other.epochs * run.steps * other.passes / phase.passes for other in later)
    return Progress(
        phase=phase,
        epoch=len(state.history) + (row is None),
        epochs=run.epochs,
        step=state.step,
        steps=run.epoch_steps,
        loss=state.epoch_loss / max(1, run.losses_read),
        learning_rate=rate,
        images_per_second=speed,
        seconds_left=steps * run.recipe.batch_size / speed if speed else math.inf,
        row=row,
    )
