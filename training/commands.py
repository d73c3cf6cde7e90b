"""The command ``robust train``."""

from __future__ import annotations

import logging
import math
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    from training.run import Progress

DEFAULT_DATA = "train.pt"
NO_DATA = """expected --data, found no train.pt in this folder. Forms that are read:
  train.pt         a pickled TaskDataset of PIL images
  FILE.pt          a dict of images and labels, a tuple, or a TensorDataset
  FILE.npz         arrays images and labels
  FOLDER, FILE.zip one folder of images per class
  cifar10          CIFAR-10, downloaded once, or a folder cifar-10-batches-py
  digits           handwritten digits: small, needs no file. Try: robust train --data digits \
--recipe quick"""


@click.command()
@click.option("--data", metavar="PATH", help="Labelled images. Default: train.pt here.")
@click.option("--recipe", "recipe_name", default="cpu", show_default=True, metavar="NAME")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default="models/robust_model.pt",
    show_default=True,
    help="Checkpoint to write; the run's own files go to runs/NAME beside it.",
)
@click.option("--device", "device_name", default="auto", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--init",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="CHECKPOINT",
    help="Weights to begin with, where classes differ all but the head. Default: random ones.",
)
@click.option(
    "--compile",
    "compile_passes",
    type=click.Choice(["auto", "on", "off"]),
    help="Passes through torch.compile. Default: as the recipe says, which is auto: on CUDA.",
)
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped.")
def train(
    data: str | None,
    recipe_name: str,
    out: Path,
    device_name: str,
    seed: int,
    init: Path | None,
    compile_passes: Literal["auto", "on", "off"] | None,
    resume: bool,
) -> None:
    """Train a robust classifier in two phases, clean and then adversarial.

    Recipes: classic, classic-cpu, cpu, cpu-further, quick, gpu, fast. Example:

        robust train --data digits --recipe quick --out models/digits.pt

    On several GPUs, or processes, which share out every batch:

        torchrun --standalone --nproc-per-node 2 -m training --data digits --recipe quick
    """
    if data is None:
        if not Path(DEFAULT_DATA).exists():
            raise click.UsageError(NO_DATA)
        data = DEFAULT_DATA
    from training.recipes import named_recipe

    recipe = named_recipe(recipe_name)  # a wrong name is told before torch is loaded
    if compile_passes is not None:
        recipe = replace(recipe, compile=compile_passes)

    from robust.checkpoint import load_checkpoint
    from robust.classifier import resolve_device
    from robust.datasets import load_dataset
    from robust.ranks import joined
    from training.distributed import was_restarted
    from training.run import Stopped
    from training.run import train as run

    device = resolve_device(device_name)
    if out.suffix != ".pt":
        raise click.UsageError(f"expected --out to end in .pt, got {out.name}")
    # Before signals are caught: a process that waits for others in vain is to end by SIGTERM.
    ranks, device = click.get_current_context().with_resource(joined(device))
    configure_logging(quiet=not ranks.is_first)
    beginning = None if init is None else load_checkpoint(init)
    dataset = load_dataset(data, size=recipe.input_size)
    if ranks.is_first:
        click.echo(
            f"{dataset.name}: {len(dataset)} images, {len(dataset.classes)} classes; "
            f"recipe {recipe.name}, {recipe.epochs} epochs on {ranks.in_words(str(device))}; "
            f"writes {out}"
        )
    display = Display(quiet=not ranks.is_first)
    with StopRequest() as stop:
        try:
            sidecar = run(
                recipe,
                dataset,
                out=out,
                device=device,
                seed=seed,
                init=beginning,
                resume=resume or was_restarted(),
                should_stop=stop.requested,
                observe=display,
                ranks=ranks,
            )
        except Stopped:
            display.close()
            if ranks.is_first:
                click.echo("stopped; the run is saved, --resume goes on with it", err=True)
            raise SystemExit(128 + (stop.signal or signal.SIGTERM)) from None
        finally:
            display.close()
    if not ranks.is_first:
        return
    held_out = ", ".join(
        f"{row['attack']} {100 * row['accuracy']:.2f}%" for row in sidecar.evaluation
    )
    click.echo(f"wrote {out} (epoch {sidecar.recipe['kept_epoch']} kept; held out: {held_out})")


commands: list[click.Command] = [train]


def configure_logging(*, quiet: bool = False) -> None:
    """Warnings and notes of the library as plain lines on standard error; if quiet errors only."""
    level = logging.ERROR if quiet else logging.INFO
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", stream=sys.stderr)


class StopRequest:
    """Turns SIGTERM and Ctrl-C, as long as the block runs, into a question asked between steps."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> StopRequest:
        self._before = [signal.signal(number, self._note) for number in self.SIGNALS]
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in zip(self.SIGNALS, self._before, strict=True):
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step
        self.signal = number

    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal != 0


class Display:
    """A progress bar on a terminal; elsewhere a plain line now and then. Nothing if quiet."""

    EVERY = 60.0  # seconds between plain lines

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.bar: Any = None
        self.shown = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def __call__(self, progress: Progress) -> None:
        if self.quiet:
            return
        if progress.row:
            self.close()
            click.echo(epoch_line(progress))
        elif self.terminal:
            self._advance(progress)
        elif time.monotonic() - self.shown > self.EVERY:
            self.shown = time.monotonic()
            click.echo(
                f"epoch {progress.epoch}/{progress.epochs} {progress.phase.name} "
                f"step {progress.step}/{progress.steps} loss {progress.loss:.3f} "
                f"lr {progress.learning_rate:.2g} {progress.images_per_second:.0f} images/s, "
                f"{time_left(progress.seconds_left)} left"
            )

    def _advance(self, progress: Progress) -> None:
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(
                total=progress.steps,
                initial=progress.step - 1,
                desc=f"epoch {progress.epoch}/{progress.epochs} {progress.phase.name}",
                unit="step",
                leave=False,
            )
        self.bar.set_postfix(
            loss=f"{progress.loss:.3f}",
            lr=f"{progress.learning_rate:.2g}",
            images=f"{progress.images_per_second:.0f}/s",
            run=f"{time_left(progress.seconds_left)} left",
            refresh=False,
        )
        self.bar.update()

    def close(self) -> None:
        """Take the bar off the screen."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def epoch_line(progress: Progress) -> str:
    """One epoch in one line."""
    row = progress.row
    assert row is not None
    return (
        f"epoch {row['epoch']}/{progress.epochs} {row['phase']}: loss {row['loss']:.3f}, "
        f"held out (n={row['n']}) clean {100 * row['clean']:.1f}% FGSM {100 * row['fgsm']:.1f}% "
        f"PGD-10 {100 * row['pgd']:.1f}%, {row['images_per_second']:.0f} images/s, "
        f"{row['seconds']:.0f} s, {time_left(progress.seconds_left)} left"
    )


def time_left(seconds: float) -> str:
    """Seconds as ``45 s``, ``12 min`` or ``3 h 05 min``."""
    if not math.isfinite(seconds):
        return "unknown time"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
