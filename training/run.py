"""A training run: all phases through one loop, resumable at any step."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from robust.checkpoint import Checkpoint, load_checkpoint
from robust.datasets import Dataset
from robust.distributed import SINGLE, World
from robust.sidecar import Sidecar
from training.budget import Budget, Deadline, with_epochs
from training.context import (
    Run,
    begin_files,
    end_epoch,
    end_fitted,
    progress,
    write_manifest,
)
from training.data import TrainingData
from training.distributed import Collectives
from training.monitor import Observer, SpeedMeter
from training.recipe import Recipe
from training.result import write_result
from training.setup import build_model, check_ranks, make_manifest, open_run
from training.state import RunFolder, StateWriter, TrainingError
from training.step import Trainer
from training.timing import time_costs

logger = logging.getLogger(__name__)

SAVE_SECONDS = 300.0  # between saves of the state within a phase


class Stopped(Exception):
    """The run was asked to stop; its state is saved."""


def train(
    recipe: Recipe,
    dataset: Dataset,
    *,
    out: Path,
    device: torch.device,
    seed: int = 0,
    init: Checkpoint | None = None,
    validation: Dataset | None = None,
    resume: bool = False,
    deadline: Deadline | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    observe: Observer = lambda progress: None,
    world: World = SINGLE,
) -> Sidecar:
    """Train, keep the best model on held-out images, and write the checkpoint `out` at the end.

    The run's own files go to ``runs/NAME`` beside it. The state there is saved every five minutes,
    at the end of each phase, and when `should_stop` returns True, after which Stopped is raised.
    With `resume` a run continues from there; on the CPU its result is bit-equal to that of an
    uninterrupted run. With `deadline` the epochs of the phases are fitted to the time until then,
    see `training.budget`; a resumed run keeps those epochs. With `init` training starts from the
    weights of that checkpoint, with a new head if the classes differ. `validation` replaces the
    held-out share of `dataset`.

    Raises TrainingError if another run uses the same output, an unfinished run would be lost,
    `resume` finds another recipe, data, seed or init, `init` has another architecture, the
    deadline is too close, the loss is not finite, or the disk is full; a refused run leaves no
    files.

    All ranks of `world` get the same arguments and share every batch, see `training.distributed`;
    only rank 0 reads and writes files.
    """
    folder, collectives = RunFolder.of(out), Collectives(world)
    with ExitStack() as stack:
        world.on_rank0(lambda: stack.enter_context(folder.locked()))
        try:
            manifest = make_manifest(recipe, dataset, seed=seed, init=init, validation=validation)
            check_ranks(world, recipe, manifest)
            manifest, state = world.on_rank0(
                lambda: open_run(
                    folder,
                    manifest,
                    init=init,
                    resume=resume,
                    minutes=None if deadline is None else deadline.minutes,
                )
            )
            if state is None:
                logger.info("%s: this run is finished; %s is its result", folder.path, out)
                return world.on_rank0(lambda: load_checkpoint(out).sidecar)
            if "minutes" in manifest:  # fitted before the run was stopped
                epochs = [phase["epochs"] for phase in manifest["recipe"]["phases"]]
                recipe, deadline = with_epochs(recipe, epochs), None
            data = TrainingData.split(
                dataset, recipe, seed=seed, device=device, validation=validation
            )
            manifest = {**manifest, "class_counts": data.count_record()}
            model = build_model(recipe, dataset, seed=seed, init=init, validation=validation)
            trainer = Trainer(
                model,
                recipe,
                device=device,
                collectives=collectives,
                class_weights=data.class_weights,
            )
            if state.model:
                trainer.load_state(state)
            run = Run(
                recipe=recipe,
                seed=seed,
                data=data,
                trainer=trainer,
                state=state,
                folder=folder,
                manifest=manifest,
                writer=stack.enter_context(StateWriter(folder.state)),
                should_stop=should_stop,
                observe=observe,
            )
            if deadline is not None:
                costs = time_costs(trainer, data, recipe, deadline.clock)
                run.budget = Budget(recipe, deadline, costs, world)
                manifest["minutes"] = run.budget.to_dict()
                run.recipe = run.budget.fit(recipe)
            if world.is_rank0:
                run.board = stack.enter_context(begin_files(run))
            while state.phase < len(run.recipe.phases):
                run_phase(run)
            return write_result(
                trainer,
                data,
                state,
                folder,
                manifest,
                classes=dataset.classes,
                writer=run.writer,
            )
        except BrokenPipeError:  # from an observer's output, not from the run's files
            raise
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise TrainingError(f"{folder.path}: could not be written: {reason}") from error


def run_phase(run: Run) -> None:
    """Train the rest of a phase."""
    state = run.state
    if run.budget is not None and state.phase and not run.done:
        run.recipe = run.budget.fit(run.recipe, state.phase)
        write_manifest(run)
    # A run that stopped at the last step of a phase still has to score it.
    while state.step or run.done < run.phase_steps:
        run_epoch(run)
    if state.phase_steps:
        end_fitted(run)
    state.phase, state.epoch, state.phase_steps = state.phase + 1, 0, 0
    run.trainer.reset_optimizer()
    save(run)


def run_epoch(run: Run) -> None:
    """Train the rest of an epoch, and score it."""
    state, data, phase, n = run.state, run.data, run.phase, run.recipe.batch_size
    order = torch.randperm(len(data.images), generator=run.generator(step=0, device="cpu"))
    order = order.to(run.trainer.device)  # once per epoch, as a copy to a GPU synchronizes
    meter = SpeedMeter(n)
    while state.step < run.epoch_steps:
        done, rate = run.done, run.learning_rate(run.done)
        batch = order[state.step * n : (state.step + 1) * n]
        state.step += 1
        loss = run.trainer.step(
            data.images[batch],
            data.labels[batch],
            phase=phase,
            learning_rate=rate,
            awp=phase.awp if done >= phase.awp_from * run.phase_steps else 0.0,
            generator=run.generator(step=state.step, device=run.trainer.device),
        )
        run.unread.append(loss)
        meter.steps += 1
        check = len(run.unread) == run.check_every or state.step == run.epoch_steps
        if check:
            read_losses(run)
        run.observe(progress(run, rate, meter.images_per_second))
        if check:
            save_or_stop(run)
            keep_in_time(run)
    rate = run.learning_rate(run.done - 1)
    row = end_epoch(run, rate, meter.images_per_second)
    run.observe(progress(run, rate, meter.images_per_second, row))
    state.epoch, state.step, state.epoch_loss = state.epoch + 1, 0, 0.0


def read_losses(run: Run) -> None:
    """Read the losses of the last steps. Raises TrainingError for one that is not finite."""
    state = run.state
    for step, value in enumerate(torch.stack(run.unread).tolist(), run.losses_read + 1):
        if not math.isfinite(value):
            run.writer.wait()
            kept = run.folder.state.exists()
            raise TrainingError(
                f"the loss became {value} in phase {run.phase.name}, epoch {state.epoch + 1}, "
                f"step {step}; lower learning_rate or set gradient_clip"
                + (f"; the last state before it is in {run.folder.state}" if kept else "")
            )
        state.epoch_loss += value
    run.unread.clear()


def save_or_stop(run: Run) -> None:
    """Save the state if it is time; if the run should stop, save it and raise Stopped."""
    run.writer.check()
    if run.trainer.collectives.any(run.should_stop()):
        save(run)
        run.writer.wait()
        raise Stopped
    if time.monotonic() - run.saved > SAVE_SECONDS:
        save(run)


def keep_in_time(run: Run) -> None:
    """With `--minutes`, fit the number of steps of the phase to the remaining time."""
    if run.budget is None or run.done == run.phase_steps:
        return
    planned = run.phase.epochs * run.steps
    fits = run.budget.fit_steps(run.recipe, run.state.phase, done=run.done, total=planned)
    run.state.phase_steps = 0 if fits == planned else fits


def save(run: Run) -> None:
    """Start writing the state."""
    run.saved = time.monotonic()
    if run.is_rank0:
        run.state.seconds = run.saved - run.began
        run.trainer.fill_state(run.state)
        run.writer.save(run.state)
