"""Shows results on the terminal and writes them to files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robust.tables import plain

if TYPE_CHECKING:
    from robust.datasets import Dataset
    from robust.evaluation.forecast import Forecast

LONG = 10.0  # seconds above which a forecast is printed


def percent(share: float) -> str:
    """A share as ``12.3%``."""
    return f"{100 * share:.1f}%"


def echo_changes(dataset: Dataset) -> None:
    """Print on standard error what was resized, skipped or guessed in reading the data."""
    for line in dataset.changes:
        click.echo(f"note: {plain(dataset.name)}: {plain(line)}", err=True)


def write_report(path: Path, value: Any) -> None:
    """Write `value` as JSON to a file, atomically, or to standard output for ``-``."""
    from robust.files import to_json, write_json

    if str(path) == "-":
        click.echo(to_json(value), nl=False)
    elif path.exists() and not path.is_file():  # a pipe or device can't be replaced by a rename
        path.write_bytes(to_json(value))
    else:
        write_json(path.resolve(), value)


def data_record(dataset: Dataset, scored: Dataset) -> dict[str, Any]:
    """What a JSON result says of a dataset and of the images of it that were scored."""
    return {
        "name": dataset.name,
        "count": len(dataset),
        "sha256": dataset.sha256,
        "dtype": dataset.dtype,
        "changes": list(scored.changes),
        "scored": len(scored),
        "scored_sha256": scored.sha256,
    }


class Progress:
    """A progress bar on a terminal; elsewhere a line per tenth of the work. Nothing if quiet."""

    def __init__(self, total: int, *, title: str, unit: str, quiet: bool = False) -> None:
        self.total, self.title, self.unit, self.quiet = total, title, unit, quiet
        self.done, self.tenths = 0, 0
        self.bar: Any = None
        if sys.stderr.isatty() and not quiet:
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=title, unit=unit, leave=False)

    def update(self, done: int, note: str) -> None:
        """Show that `done` of the total are finished, with `note` on the result so far."""
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(done - self.done)
        elif done * 10 // self.total > self.tenths and not self.quiet:
            self.tenths = done * 10 // self.total
            share = f"{done}%" if self.unit == "%" else f"{done}/{self.total} {self.unit}"
            click.echo(f"{self.title}: {share}, {note}", err=True)
        self.done = done

    def show_forecast(self, forecast: Forecast) -> None:
        """Print an upper bound on the time, if it is long."""
        if self.quiet or forecast.seconds < LONG:
            return
        from robust.report.words import duration

        worst, more = "", " more" if forecast.stage else ""
        if forecast.worst > forecast.passes:
            worst = f", or {duration(forecast.worst_seconds)} if gradients turn out to be masked"
        left = f" remain after {forecast.stage}" if forecast.stage else ""
        shard = f" (of one of {forecast.processes} processes)" if forecast.processes > 1 else ""
        click.echo(
            f"note: {forecast.images} images{shard}{left}: at most {duration(forecast.seconds)}"
            f"{more}{worst} ({forecast.passes} passes of {forecast.seconds_per_pass:.2g} s); "
            "images fooled early take fewer",
            err=True,
        )

    def tick(self) -> None:
        """Redraw the bar, to show that work continues."""
        if self.bar is not None:
            self.bar.refresh()

    def close(self) -> None:
        """Remove the bar from the screen."""
        if self.bar is not None:
            self.bar.close()
