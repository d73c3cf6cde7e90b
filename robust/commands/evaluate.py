"""``robust evaluate``: how accurate a checkpoint is, clean and under attack."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from robust.commands.options import (
    attack_options,
    checkpoint_option,
    device_option,
    resolve_attacks,
)
from robust.commands.output import Progress, percent, table, write_report

if TYPE_CHECKING:
    from robust.evaluation import Evaluation


@click.command()
@checkpoint_option
@click.option("--data", required=True, metavar="PATH", help="Labelled images, or a known name.")
@click.option("--test/--train", default=True, help="Which part of a named set. Default: test.")
@device_option
@attack_options
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Score the first N images (evenly spread ones where the data is sorted by class).",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=100, show_default=True)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="Write the result as JSON too; - prints it instead of the table.",
)
@click.option("--record", is_flag=True, help="Add the accuracies to the checkpoint's sidecar.")
def evaluate(
    checkpoint: Path,
    data: str,
    test: bool,
    device_name: str,
    attack_names: tuple[str, ...],
    norm: str,
    eps: float | None,
    alpha: float | None,
    steps: int | None,
    restarts: int | None,
    seed: int,
    limit: int | None,
    batch_size: int,
    json_path: Path | None,
    record: bool,
) -> None:
    """Measure clean and robust accuracy on labelled images.

    An image counts as robust when it is right as it came and at every step of the attack; the
    worst case is over all attacks together. Example:

    \b
        robust evaluate --data cifar10 --attack pgd-50 --limit 1000
    """
    from robust.checkpoint import load_checkpoint, record_evaluation
    from robust.classifier import resolve_device
    from robust.datasets import load_dataset
    from robust.doubts import doubts
    from robust.environment import device_in_words, versions
    from robust.evaluation import evaluate_batches
    from robust.matching import first_images, match_classes

    start = time.perf_counter()
    attacks = resolve_attacks(
        attack_names,
        norm=norm,
        eps=eps,
        alpha=alpha,
        steps=steps,
        restarts=restarts,
        seed=seed,
    )
    device = resolve_device(device_name)
    loaded = load_checkpoint(checkpoint, device=device)
    classes = loaded.sidecar.classes
    dataset = load_dataset(data, size=loaded.classifier.architecture.input_size, train=not test)
    scored = match_classes(dataset, classes)
    if limit is not None:
        scored = first_images(scored, limit)

    progress = Progress(len(scored), title="evaluate", unit="images")
    try:
        for evaluation in evaluate_batches(
            loaded.classifier,
            scored.images,
            scored.labels,
            num_classes=len(classes),
            attacks=attacks,
            device=device,
            batch_size=batch_size,
        ):
            progress.update(evaluation.n, _so_far(evaluation))
    finally:
        progress.close()

    reasons = doubts(evaluation)
    seconds = time.perf_counter() - start
    if json_path is not None:
        report = {
            "checkpoint": str(checkpoint),
            "weights_sha256": loaded.sha256,
            "data": {"name": dataset.name, "count": len(dataset), "sha256": dataset.sha256},
            **evaluation.to_dict(),
            "classes": list(classes),
            "doubts": list(reasons),
            "batch_size": batch_size,
            "versions": versions(),
            "device": device_in_words(device),
            "seconds": seconds,
        }
        write_report(json_path, report)
    if record:
        source = {"data": dataset.name, "data_sha256": scored.sha256}
        rows = [{**source, **item.to_dict()} for item in evaluation.accuracies]
        record_evaluation(loaded, rows)
    if str(json_path) != "-":
        click.echo(f"{checkpoint} on {evaluation.n} of {len(dataset)} images of {dataset.name}")
        click.echo(_describe(evaluation))
        click.echo(f"{seconds:.1f} s on {device_in_words(device)}")
    for reason in reasons:
        click.echo(f"warning: {reason}", err=True)


def _so_far(evaluation: Evaluation) -> str:
    return ", ".join(f"{item.label} {percent(item.value)}" for item in evaluation.accuracies)


def _describe(evaluation: Evaluation) -> str:
    from robust.evaluation import wilson_interval
    from robust.threat_model import format_eps

    def row(
        label: str, correct: int, *, norm: str = "", eps: str = "", seconds: str = ""
    ) -> list[str]:
        low, high = wilson_interval(correct, evaluation.n)
        accuracy = f"{100 * correct / evaluation.n:.2f}"
        interval = f"{100 * low:.1f} to {100 * high:.1f}"
        return [label, norm, eps, accuracy, interval, f"{correct}/{evaluation.n}", seconds]

    rows = []
    for item in evaluation.accuracies:
        ball = item.attack.threat_model if item.attack else None
        rows.append(
            row(
                item.label,
                item.correct,
                norm=ball.norm if ball else "",
                eps=format_eps(ball.eps) if ball else "",
                seconds=f"{item.seconds:.1f}",
            )
        )
    if len(evaluation.attacks) > 1:
        rows.append(row("worst case", evaluation.worst_correct))
    header = ("attack", "norm", "eps", "accuracy %", "95% interval", "correct", "seconds")
    return table(header, rows)
