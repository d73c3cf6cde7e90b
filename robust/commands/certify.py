"""``robust certify``: certified accuracy by randomized smoothing."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import click

from robust.commands.evaluate import default_batch_size
from robust.commands.options import (
    MAX_SEED,
    ModelChoice,
    Size,
    data_options,
    json_option,
    model_options,
)
from robust.commands.output import Progress, data_record, echo_changes, percent, write_report
from robust.tables import plain, table

RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


@click.command()
@model_options
@data_options
@click.option(
    "--sigma",
    type=Size(),
    default=0.25,
    show_default=True,
    metavar="SIZE",
    help="Standard deviation of the Gaussian noise, in pixel units.",
)
@click.option(
    "--samples",
    type=click.IntRange(100, 1_000_000),
    default=1000,
    show_default=True,
    help="Noisy copies per image; more give larger radii.",
)
@click.option(
    "--alpha",
    type=click.FloatRange(0, 0.5, min_open=True),
    default=0.001,
    show_default=True,
    help="Maximum probability that a radius is wrong.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, MAX_SEED),
    default=0,
    show_default=True,
    help="Seed of the noise.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Noisy copies per pass. Default: 100, fewer for images over 64 pixels.",
)
@json_option
def certify(
    model: ModelChoice,
    data: str,
    test: bool,
    limit: int | None,
    sigma: float,
    samples: int,
    alpha: float,
    seed: int,
    batch_size: int | None,
    json_path: Path | None,
) -> None:
    """Certify accuracy under any L2 attack, by randomized smoothing.

    The smoothed classifier predicts the class that the model outputs most often under Gaussian
    noise (Cohen et al. 2019). Within a certified L2 radius no attack changes its prediction. The
    model should have been trained with such noise. Example:

    \b
        robust certify --data test.npz --limit 100 --sigma 0.12
    """
    import torch

    from robust.datasets import load_dataset
    from robust.environment import device_in_words, versions
    from robust.evaluation import wilson_interval
    from robust.evaluation.smoothing import ABSTAINED, largest_radius
    from robust.evaluation.smoothing import certify as certify_image
    from robust.images import to_float
    from robust.matching import first_indices, match_classes

    start = time.perf_counter()
    loaded = model.load()
    classifier = loaded.classifier
    size, device = classifier.architecture.input_size, classifier.mean.device
    dataset = load_dataset(data, size=size, train=not test)
    scored = match_classes(dataset, loaded.sidecar.classes)
    echo_changes(scored)
    if limit is not None:
        scored = scored.subset(first_indices(scored, limit))
    progress = Progress(len(scored), title="certify", unit="images")
    rows: list[dict[str, Any]] = []
    try:
        for index, (image, label) in enumerate(zip(scored.images, scored.labels, strict=True)):
            x = (to_float(image) if image.dtype == torch.uint8 else image).to(device)
            found = certify_image(
                classifier,
                x,
                sigma=sigma,
                samples=samples,
                alpha=alpha,
                batch_size=batch_size or default_batch_size(size),
                generator=torch.Generator().manual_seed(seed * (MAX_SEED + 1) + index),
            )
            right = found.predicted == int(label)
            rows.append({"label": int(label), **vars(found), "right": right})
            done = sum(row["right"] for row in rows) / len(rows)
            progress.update(index + 1, f"right {percent(done)}")
    finally:
        progress.close()
    n = len(rows)
    results = []
    for radius in RADII:
        correct = sum(row["right"] and row["radius"] >= radius for row in rows)
        results.append(
            {
                "radius": radius,
                "correct": correct,
                "n": n,
                "certified_accuracy": correct / n,
                "interval": list(wilson_interval(correct, n)),
            }
        )
        if not correct:
            break
    most = largest_radius(sigma=sigma, samples=samples, alpha=alpha)
    abstained = sum(row["predicted"] == ABSTAINED for row in rows)
    if str(json_path) != "-":
        click.echo(f"{plain(model.spec)} on {n} of {len(dataset)} images of {plain(dataset.name)}")
        header = ("l2 radius", "certified %", "95% interval", "correct")
        lines = [
            [
                f"{item['radius']:g}",
                f"{100 * item['certified_accuracy']:.2f}",
                " to ".join(f"{100 * side:.1f}" for side in item["interval"]),
                f"{item['correct']}/{n}",
            ]
            for item in results
        ]
        click.echo(table(header, lines))
        radii = [row["radius"] for row in rows if row["right"]]
        if radii:
            click.echo(
                f"radius of the correct images: median {median(radii):.3g}, largest "
                f"{max(radii):.3g}; at most {most:.3g} with these settings"
            )
        click.echo(
            f"sigma {sigma:g}, {samples} samples, alpha {alpha:g}; abstained on {abstained}; "
            f"{time.perf_counter() - start:.1f} s on {device_in_words(device)}"
        )
    if json_path is not None:
        write_report(
            json_path,
            {
                "checkpoint": model.spec,
                "model": loaded.origin(),
                "weights_sha256": loaded.sha256,
                "data": data_record(dataset, scored),
                "sigma": sigma,
                "samples": samples,
                "alpha": alpha,
                "seed": seed,
                "results": results,
                "abstained": abstained,
                "images": rows,
                "versions": versions(),
                "device": device_in_words(device),
                "seconds": time.perf_counter() - start,
            },
        )
