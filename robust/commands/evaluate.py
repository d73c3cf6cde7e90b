"""``robust evaluate``: clean and robust accuracy of a checkpoint."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robust.commands.options import (
    AttackCommand,
    ModelChoice,
    attack_options,
    data_options,
    echo_other_threat_model,
    json_option,
    model_options,
    resolve_attacks,
)
from robust.commands.output import Progress, data_record, echo_changes, percent, write_report
from robust.tables import plain

if TYPE_CHECKING:
    from robust.evaluation import Evaluation
    from robust.evaluation.run import Precision


@click.command(cls=AttackCommand)
@model_options
@data_options
@attack_options
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Images per pass. Default: 100, fewer for images over 64 pixels.",
)
@json_option
@click.option(
    "--curve",
    type=click.IntRange(min=0),
    default=100,
    show_default=True,
    metavar="N",
    help="Attack N images again at increasing eps; 0 for none.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="Precision of the search; successes are confirmed in fp32. auto: bf16 if it is faster.",
)
@click.option(
    "--journal",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Record finished images there; the same command resumes from it.",
)
@click.option(
    "--format",
    "table_format",
    type=click.Choice(["text", "markdown", "latex"]),
    default="text",
    show_default=True,
    help="Format of the table.",
)
@click.option("--record", is_flag=True, help="Add the accuracies to the checkpoint's sidecar.")
def evaluate(
    model: ModelChoice,
    data: str,
    test: bool,
    attack_names: tuple[str, ...],
    norm: str,
    eps: float | None,
    alpha: float | None,
    steps: int | None,
    restarts: int | None,
    seed: int,
    limit: int | None,
    batch_size: int | None,
    json_path: Path | None,
    curve: int,
    precision: Precision,
    journal: Path | None,
    table_format: str,
    record: bool,
) -> None:
    """Measure clean and robust accuracy on labeled images.

    An image counts as robust if it is classified correctly before the attack and at each of its
    steps; in the worst case it must be robust to all attacks. Warnings about unreliable numbers
    follow the table. Examples:

    \b
        robust evaluate --data cifar10 --attack pgd-50 --limit 1000
        robust evaluate --data test.npz --attack autoattack --journal test.journal

    On several GPUs or processes, each of which evaluates a shard of the images:

    \b
        torchrun --standalone --nproc-per-node 2 -m robust_cli evaluate --data test.npz
    """
    from robust.checkpoint import check_recordable, record_evaluation
    from robust.datasets import load_dataset
    from robust.distributed import init_distributed
    from robust.environment import device_in_words, versions
    from robust.evaluation.flags import SEEN_IMAGES
    from robust.evaluation.run import CURVE_ATTACK, evaluate_batches
    from robust.evaluation.tables import accuracy_table, curve_table
    from robust.matching import first_indices, match_classes

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
    # A long timeout, as some ranks may finish hours before others.
    group = init_distributed(model.device(), timeout=timedelta(days=30))
    world, device = click.get_current_context().with_resource(group)
    loaded = model.load(device)
    device = loaded.classifier.mean.device  # the CPU if the accelerator disagreed with it
    loaded.check_attacks(attacks)
    if record:
        check_recordable(loaded)
    classes, size = loaded.sidecar.classes, loaded.classifier.architecture.input_size
    batch_size = batch_size or default_batch_size(size)
    dataset = load_dataset(data, size=size, train=not test)
    scored = match_classes(dataset, classes)
    if world.is_rank0:
        echo_other_threat_model(loaded.sidecar, attacks[0].threat_model)
        echo_changes(scored)
    if limit is not None:
        indices = first_indices(scored, limit)
        scored = scored.subset(indices)

    progress = Progress(100, title="evaluate", unit="%", quiet=not world.is_rank0)
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
        watch=progress.tick,
        on_forecast=progress.show_forecast,
        world=world,
    )
    try:
        # Also closed on Ctrl-C, so that the journal is released.
        with closing(progress), closing(results):
            for evaluation in results:
                progress.update(int(100 * evaluation.done), _so_far(evaluation))
    except KeyboardInterrupt:
        if world.is_rank0:
            how = "nothing was kept, as there is no --journal"
            if journal is not None:
                how = f"the same command resumes from {plain(str(journal))}"
            click.echo(f"stopped: {how}", err=True)
        raise click.Abort from None
    if not world.is_rank0:
        return
    trained_on = loaded.sidecar.data
    if trained_on is not None and trained_on.sha256 == dataset.sha256:
        evaluation = replace(evaluation, flags=(SEEN_IMAGES, *evaluation.flags))

    seconds, used = time.perf_counter() - start, world.in_words(device_in_words(device))
    if str(json_path) != "-":
        images = f"{evaluation.n} of {len(dataset)} images of {plain(dataset.name)}"
        click.echo(f"{plain(model.spec)} on {images}")
        click.echo(accuracy_table(evaluation, table_format))
        for difference in evaluation.differences:
            click.echo(str(difference))
        if evaluation.curve:
            click.echo(f"at other eps ({CURVE_ATTACK}, {evaluation.curve[0].n} images):")
            click.echo(curve_table(evaluation, table_format))
        why = f" ({evaluation.precision_reason})" if evaluation.precision_reason else ""
        click.echo(f"{seconds:.1f} s on {used}, {evaluation.precision}{why}")
        if evaluation.times and str(evaluation.times):
            click.echo(str(evaluation.times))
    for line in evaluation.notes:
        click.echo(f"note: {line}", err=True)
    for flag in evaluation.flags:
        click.echo(f"warning: {flag.name}: {flag}", err=True)
    if json_path is not None:
        report = {
            "checkpoint": model.spec,
            "model": loaded.origin(),
            "weights_sha256": loaded.sha256,
            "data": {
                **data_record(dataset, scored),
                "indices": "all" if limit is None else indices.tolist(),
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
        source: dict[str, Any] = {
            "data": dataset.name,
            "data_sha256": scored.sha256,
            "device": used,
        }
        if evaluation.flags:  # a number is never recorded without its warnings
            source["flags"] = sorted({flag.name for flag in evaluation.flags})
        rows = [{**source, **item.summary()} for item in evaluation.accuracies]
        record_evaluation(loaded, rows)


def default_batch_size(input_size: int) -> int:
    """Images per pass: 100 up to 64 pixels a side, beyond that the same number of pixels."""
    return max(1, min(100, 100 * 64**2 // input_size**2))


def _so_far(evaluation: Evaluation) -> str:
    shown = []
    for item in evaluation.accuracies:
        if item.n:
            low, high = item.interval
            shown.append(f"{item.label} {percent(item.value)} ({percent(low)} to {percent(high)})")
    stage = f"{evaluation.stage}: " if evaluation.stage else ""
    return stage + ", ".join(shown)
