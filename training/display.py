"""The progress of a run on the terminal."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from training.monitor import Progress


class Display:
    """A progress bar on a terminal, a plain line every minute elsewhere; nothing if `quiet`."""

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
        """Remove the bar from the screen."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def epoch_line(progress: Progress) -> str:
    """The metrics of an epoch in one line."""
    row = progress.row
    assert row is not None
    scored = ""
    if row["n"]:
        scored = (
            f"held out (n={row['n']}) clean {100 * row['clean']:.1f}% "
            f"FGSM {100 * row['fgsm']:.1f}% PGD-10 {100 * row['pgd']:.1f}%, "
        )
    return (
        f"epoch {row['epoch']}/{progress.epochs} {row['phase']}: loss {row['loss']:.3f}, {scored}"
        f"{row['images_per_second']:.0f} images/s, {row['seconds']:.0f} s, "
        f"{time_left(progress.seconds_left)} left"
    )


def time_left(seconds: float) -> str:
    """Seconds as ``45 s``, ``12 min`` or ``3 h 05 min``."""
    if not math.isfinite(seconds):
        return "unknown time"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
