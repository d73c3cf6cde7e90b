"""``robust report``: a report on a checkpoint and its training run, as HTML and PDF."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robust.commands.options import (
    DEFAULT_CHECKPOINT,
    ModelChoice,
    describing_options,
    device_option,
    test_option,
)
from robust.commands.output import echo_changes
from robust.datasets.registry import data_help

if TYPE_CHECKING:
    from robust.checkpoint import Checkpoint
    from robust.report.evaluations import Measurement

RUNS = "runs"  # folder of runs, in the folder of a checkpoint
HTML, PDF = "report.html", "report.pdf"
MAX_EXAMPLES = 50


@click.command()
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option(
    "--evaluation",
    "evaluations",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="JSON written by robust evaluate --json. Repeat for more. Default: those in the sidecar.",
)
@click.option(
    "--model",
    "--checkpoint",
    "checkpoint",
    type=click.Path(path_type=Path),
    metavar="MODEL",
    help="Model, as for robust evaluate. Default: the run's checkpoint, NAME.pt for runs/NAME.",
)
@describing_options
@click.option("--data", metavar="PATH", help=f"Images to show a few of. {data_help()}")
@test_option
@click.option(
    "--examples",
    type=click.IntRange(1, MAX_EXAMPLES),
    default=10,
    show_default=True,
    metavar="N",
    help="Number of images to show.",
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
    **description: Any,
) -> None:
    """Write a report on a training run, as HTML and as PDF.

    RUN is the folder of the run, by default models/runs/robust_model. Both files are
    self-contained. With --data they show a few of its images. Example:

    \b
        robust evaluate --data test.npz --json pgd.json
        robust report models/runs/robust_model --evaluation pgd.json --data test.npz
    """
    from robust.report import require_extra

    require_extra()

    from robust.datasets import load_dataset
    from robust.environment import device_in_words, versions
    from robust.files import write_bytes
    from robust.matching import match_classes
    from robust.report.build import build_report
    from robust.report.examples import show_examples
    from robust.report.html import render_html
    from robust.report.pdf import render_pdf
    from robust.report.run import check_belongs, read_run

    checkpoint, folder = find_run(run, checkpoint)
    training = None if folder is None else read_run(folder)
    loaded = ModelChoice(
        spec=str(checkpoint), device_name=device_name, description=description
    ).load()
    device = loaded.classifier.mean.device
    if training is not None:
        check_belongs(training, loaded.sidecar, loaded.path)
    measurements = _read_evaluations(evaluations, loaded)
    shown = None
    if data is not None:
        size = loaded.classifier.architecture.input_size
        dataset = load_dataset(data, size=size, train=not test).in_8_bits()
        dataset = match_classes(dataset, loaded.sidecar.classes)
        echo_changes(dataset)
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
        write_bytes((out / name).resolve(), content)
    if not evaluations:
        click.echo("no --evaluation: using the accuracies recorded in the sidecar")
    if shown is None:
        click.echo("no --data: no images and loss surfaces in the report")
    click.echo(f"wrote {out / HTML} and {out / PDF}")


def find_run(run: Path | None, checkpoint: Path | None) -> tuple[Path, Path | None]:
    """The checkpoint and the run; one that is not given is derived from the other.

    A checkpoint may have no run; a run that is given must exist.
    """
    if run is not None:
        resolved = run.resolve()
        return checkpoint or resolved.parent.parent / f"{resolved.name}.pt", run
    checkpoint = checkpoint or DEFAULT_CHECKPOINT
    default_run = checkpoint.parent / RUNS / checkpoint.stem
    return checkpoint, default_run if default_run.is_dir() else None


def _read_evaluations(paths: tuple[Path, ...], loaded: Checkpoint) -> tuple[Measurement, ...]:
    from robust.checkpoint import sidecar_path
    from robust.report.evaluations import read_evaluation, recorded_evaluations

    if not paths:
        return recorded_evaluations(loaded.sidecar, sidecar_path(loaded.path).name)
    return tuple(
        read_evaluation(path, sidecar=loaded.sidecar, sha256=loaded.sha256) for path in paths
    )
