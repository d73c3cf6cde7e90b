"""``robust report``: what is known of a checkpoint, as a page to read and one to print."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from robust.commands.options import DEFAULT_CHECKPOINT, device_option

if TYPE_CHECKING:
    from robust.checkpoint import Checkpoint
    from robust.report.evaluations import Measurement
    from robust.report.run import TrainingRun

RUNS = "runs"  # beside a checkpoint
HTML, PDF = "report.html", "report.pdf"
MOST_EXAMPLES = 50


@click.command()
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option(
    "--evaluation",
    "evaluations",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="What robust evaluate --json wrote. Repeat for more. Default: what the sidecar has on "
    "record.",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Default: that of the run, NAME.pt for runs/NAME.",
)
@click.option(
    "--data", metavar="PATH", help="Labelled images, or a known name, of which to show a few."
)
@click.option("--test/--train", default=True, help="Which part of a named set. Default: test.")
@click.option(
    "--examples",
    type=click.IntRange(1, MOST_EXAMPLES),
    default=10,
    show_default=True,
    metavar="N",
    help="How many images of the data to show.",
)
@device_option
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("."),
    show_default=True,
    metavar="DIR",
    help=f"Folder for {HTML} and {PDF}.",
)
def report(
    run: Path | None,
    evaluations: tuple[Path, ...],
    checkpoint: Path | None,
    data: str | None,
    test: bool,
    examples: int,
    device_name: str,
    out: Path,
) -> None:
    """Write a report on a training run, as HTML and as PDF.

    RUN is the folder of the run, models/runs/robust_model unless another is named. Both files
    need nothing else to be read. A few images of --data are put into them. Example:

    \b
        robust evaluate --data test.npz --json pgd.json
        robust report models/runs/robust_model --evaluation pgd.json --data test.npz
    """
    from robust.report import require_extra

    require_extra()

    from robust.checkpoint import load_checkpoint
    from robust.classifier import resolve_device
    from robust.datasets import load_dataset
    from robust.environment import device_in_words, versions
    from robust.files import write_atomic
    from robust.report.build import build_report
    from robust.report.examples import show_examples
    from robust.report.html import render_html
    from robust.report.pdf import render_pdf

    device = resolve_device(device_name)
    checkpoint, folder = find_run(run, checkpoint)
    training = _read_run(folder)
    loaded = load_checkpoint(checkpoint, device=device)
    _check(training, loaded)
    measurements = _read_evaluations(evaluations, loaded)
    shown = None
    if data is not None:
        size = loaded.classifier.architecture.input_size
        dataset = load_dataset(data, size=size, train=not test)
        shown = show_examples(loaded, dataset, count=examples, device=device)
    document = build_report(
        loaded,
        run=training,
        measurements=measurements,
        examples=shown,
        made_with={**versions(), "device": device_in_words(device)},
    )
    page, printed = render_html(document).encode(), render_pdf(document)
    for name, content in ((HTML, page), (PDF, printed)):
        write_atomic((out / name).resolve(), partial(_write, content))
    if not evaluations:
        click.echo("no --evaluation: the accuracies are those on record in the sidecar")
    if shown is None:
        click.echo("no --data: without pictures and loss surfaces")
    click.echo(f"wrote {out / HTML} and {out / PDF}")


def _write(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


def find_run(run: Path | None, checkpoint: Path | None) -> tuple[Path, Path | None]:
    """Checkpoint and run, each from the other where only one is named.

    A checkpoint may be reported on without its run; a run that is named must be there.
    """
    if run is not None:
        resolved = run.resolve()
        return checkpoint or resolved.parent.parent / f"{resolved.name}.pt", run
    if checkpoint is None:
        return DEFAULT_CHECKPOINT, DEFAULT_CHECKPOINT.parent / RUNS / DEFAULT_CHECKPOINT.stem
    beside = checkpoint.parent / RUNS / checkpoint.stem
    return checkpoint, beside if beside.is_dir() else None


def _read_run(folder: Path | None) -> TrainingRun | None:
    from robust.report.run import read_run

    return None if folder is None else read_run(folder)


def _check(run: TrainingRun | None, loaded: Checkpoint) -> None:
    from robust.report.run import check_belongs

    if run is not None:
        check_belongs(run, loaded.sidecar, loaded.path)


def _read_evaluations(paths: tuple[Path, ...], loaded: Checkpoint) -> tuple[Measurement, ...]:
    from robust.checkpoint import sidecar_path
    from robust.report.evaluations import read_evaluation, recorded_evaluations

    if not paths:
        return recorded_evaluations(loaded.sidecar, sidecar_path(loaded.path).name)
    return tuple(
        read_evaluation(path, sidecar=loaded.sidecar, sha256=loaded.sha256) for path in paths
    )
