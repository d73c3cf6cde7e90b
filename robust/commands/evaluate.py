"""``robust evaluate``: how accurate a checkpoint is, clean and under attack."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from robust.evaluation.run import Precision

Row = list[str]


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
@click.option(
    "--curve",
    type=click.IntRange(min=0),
    default=100,
    show_default=True,
    metavar="N",
    help="Attack N of the images once more at growing eps; 0 for none.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="Of the search; bf16 (auto: on CUDA) has every success confirmed in fp32.",
)
@click.option(
    "--journal",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Keep what is finished there; the same command goes on from it after a stop.",
)
@click.option(
    "--format",
    "table_format",
    type=click.Choice(["text", "markdown", "latex"]),
    default="text",
    show_default=True,
    help="Of the table.",
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
    curve: int,
    precision: Precision,
    journal: Path | None,
    table_format: str,
    record: bool,
) -> None:
    """Measure clean and robust accuracy on labelled images.

    An image counts as robust when it is right as it came and at every step of the attack; the
    worst case is over all attacks together. What gives reason not to trust the numbers is told
    under the table. Examples:

    \b
        robust evaluate --data cifar10 --attack pgd-50 --limit 1000
        robust evaluate --data test.npz --attack autoattack --journal test.journal

    On several GPUs, or processes, each takes its share of the images:

    \b
        torchrun --standalone --nproc-per-node 2 -m robust_cli evaluate --data test.npz
    """
    from robust.checkpoint import load_checkpoint, record_evaluation
    from robust.classifier import resolve_device
    from robust.datasets import load_dataset
    from robust.environment import device_in_words, versions
    from robust.evaluation.flags import SEEN_IMAGES
    from robust.evaluation.run import CURVE_ATTACK, evaluate_batches
    from robust.matching import first_indices, match_classes
    from robust.ranks import joined

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
    # Long, as attacks take some images hours longer than others.
    group = joined(resolve_device(device_name), patience=timedelta(days=30))
    ranks, device = click.get_current_context().with_resource(group)
    loaded = load_checkpoint(checkpoint, device=device)
    classes = loaded.sidecar.classes
    dataset = load_dataset(data, size=loaded.classifier.architecture.input_size, train=not test)
    scored = match_classes(dataset, classes)
    if limit is not None:
        indices = first_indices(scored, limit)
        scored = scored.subset(indices)

    progress = Progress(100, title="evaluate", unit="%", quiet=not ranks.is_first)
    results = evaluate_batches(
        loaded.classifier,
        scored.images,
        scored.labels,
        num_classes=len(classes),
        attacks=attacks,
        device=device,
        batch_size=batch_size,
        curve=curve,
        precision=precision,
        journal=journal,
        model_id=loaded.sha256,
        watch=progress.tick,
        ranks=ranks,
    )
    # Closed also by Ctrl-C, so that the journal is let go.
    with closing(progress), closing(results):
        for evaluation in results:
            progress.update(int(100 * evaluation.done), _so_far(evaluation))
    if not ranks.is_first:
        return
    trained_on = loaded.sidecar.data
    if trained_on is not None and trained_on.sha256 == dataset.sha256:
        evaluation = replace(evaluation, flags=(SEEN_IMAGES, *evaluation.flags))

    seconds, used = time.perf_counter() - start, ranks.in_words(device_in_words(device))
    if str(json_path) != "-":
        click.echo(f"{checkpoint} on {evaluation.n} of {len(dataset)} images of {dataset.name}")
        click.echo(_describe(evaluation, table_format))
        if evaluation.curve:
            click.echo(f"at other eps ({CURVE_ATTACK}, {evaluation.curve[0].n} images):")
            click.echo(_curve(evaluation, table_format))
        click.echo(f"{seconds:.1f} s on {used}, {evaluation.precision}")
    for line in evaluation.notes:
        click.echo(f"note: {line}", err=True)
    for flag in evaluation.flags:
        click.echo(f"warning: {flag.name}: {flag}", err=True)
    if json_path is not None:
        report = {
            "checkpoint": str(checkpoint),
            "weights_sha256": loaded.sha256,
            "data": {
                "name": dataset.name,
                "count": len(dataset),
                "sha256": dataset.sha256,
                "scored": len(scored),
                "indices": "all" if limit is None else indices.tolist(),
                "scored_sha256": scored.sha256,
            },
            **evaluation.to_dict(),
            "classes": list(classes),
            "seed": seed,
            "batch_size": batch_size,
            "versions": versions(),
            "device": used,
            "seconds": seconds,
        }
        write_report(json_path, report)
    if record:
        source: dict[str, Any] = {"data": dataset.name, "data_sha256": scored.sha256}
        if evaluation.flags:  # a number goes nowhere without the reasons to doubt it
            source["flags"] = sorted({flag.name for flag in evaluation.flags})
        rows = [{**source, **item.summary()} for item in evaluation.accuracies]
        record_evaluation(loaded, rows)


def _so_far(evaluation: Evaluation) -> str:
    shown = []
    for item in evaluation.accuracies:
        if item.n:
            low, high = item.interval
            shown.append(f"{item.label} {percent(item.value)} ({percent(low)} to {percent(high)})")
    stage = f"{evaluation.stage}: " if evaluation.stage else ""
    return stage + ", ".join(shown)


def _describe(evaluation: Evaluation, table_format: str) -> str:
    from robust.evaluation import wilson_interval
    from robust.threat_model import format_eps

    n = evaluation.n

    def row(
        label: str, correct: int, *, ball: tuple[str, str] = ("", ""), seconds: str = ""
    ) -> Row:
        low, high = wilson_interval(correct, n)
        accuracy = f"{100 * correct / n:.2f}"
        interval = f"{100 * low:.1f} to {100 * high:.1f}"
        return [label, *ball, accuracy, interval, f"{correct}/{n}", seconds]

    rows = []
    for item in evaluation.accuracies:
        threat_model = item.attack.threat_model if item.attack else None
        ball = (threat_model.norm, format_eps(threat_model.eps)) if threat_model else ("", "")
        for stage in item.stages:
            rows.append(
                row(f"  {stage.attack}", stage.correct, ball=ball, seconds=f"{stage.seconds:.1f}")
            )
        rows.append(row(item.label, item.correct, ball=ball, seconds=f"{item.seconds:.1f}"))
    if len(evaluation.attacks) > 1:
        rows.append(row("worst case", evaluation.worst_correct))
    header = ("attack", "norm", "eps", "accuracy %", "95% interval", "correct", "seconds")
    return table(header, rows, table_format)


def _curve(evaluation: Evaluation, table_format: str) -> str:
    from robust.threat_model import format_eps

    header = ["eps", *(format_eps(point.eps) for point in evaluation.curve)]
    values = [f"{100 * point.correct / point.n:.1f}" for point in evaluation.curve]
    return table(header, [["accuracy %", *values]], table_format)
