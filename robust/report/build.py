"""Builds a report from a checkpoint, its training run, its evaluations and a few images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from robust.checkpoint import Checkpoint
from robust.report.document import Block, Document, Highlights, Section, Text
from robust.report.evaluations import CLEAN, WORST, Measurement, Result
from robust.report.example_sections import gallery, surface
from robust.report.examples import Examples
from robust.report.manifest import manifest
from robust.report.result_sections import accuracies, against_eps, by_class, cost, differences
from robust.report.run import TrainingRun
from robust.report.training_sections import learning, method
from robust.report.trust import trust
from robust.report.words import count, duration, finite, images_of, interval, listed, percent


def build_report(
    checkpoint: Checkpoint,
    *,
    measurements: Sequence[Measurement],
    run: TrainingRun | None = None,
    examples: Examples | None = None,
    made_with: Mapping[str, str],
) -> Document:
    """The whole report; sections without data say so.

    `made_with` are the versions of the software. Equal inputs give equal reports.
    """
    sidecar = checkpoint.sidecar
    classes = sidecar.classes
    sections = (
        _summary(measurements),
        trust(measurements, None if examples is None else examples.surfaces),
        method(sidecar),
        learning(run, sidecar),
        against_eps(measurements, classes=len(classes)),
        by_class(measurements, classes),
        gallery(examples),
        surface(examples),
        cost(measurements, _training_cost(run, sidecar.duration_seconds)),
        manifest(checkpoint, measurements, examples, made_with=made_with),
    )
    network = sidecar.architecture
    subtitle = (
        f"{network.arch}, {len(classes)} classes, {network.input_size} x {network.input_size} "
        f"pixels · weights {checkpoint.sha256[:16]}…"
    )
    return Document(
        title=f"How robust is {checkpoint.path.name}?", subtitle=subtitle, sections=sections
    )


def _summary(measurements: Sequence[Measurement]) -> Section:
    blocks: list[Block] = []
    largest = max(measurements, key=lambda item: item.n, default=None)
    if largest is None:
        text = "There are no accuracies: no evaluation was given, and the sidecar has none."
        return Section(title="Summary", blocks=(Text(text=text),))
    shown = [(item, result) for item in measurements for result in _highlighted(item, largest)]
    blocks.append(Highlights(items=tuple(_card(item, result) for item, result in shown)))
    text = (
        "An image counts as robust if it is classified correctly, without the attack and at "
        "everything the attack tries within the ball. The interval is a 95% confidence interval "
        "(Wilson) of the accuracy on images of this kind."
    )
    blocks += [Text(text=text), accuracies(measurements), *differences(measurements)]
    return Section(title="Summary", blocks=tuple(blocks))


def _highlighted(item: Measurement, largest: Measurement) -> list[Result]:
    """The robust accuracy of a measurement; of the one with most images the clean one too."""
    clean = [item.clean] if item is largest and item.clean else []
    return [*clean, *([item.robust] if item.robust else [])]


def _card(item: Measurement, result: Result) -> tuple[str, str, str]:
    """A highlight: the accuracy, the attack, and the interval with the images."""
    name = result.attack
    if result.attack == WORST:
        name = f"under {listed([attack.attack for attack in item.attacks])}, {result.ball}"
    elif result.attack != CLEAN:
        name = f"under {result.attack}, {result.ball}"
    low_high = interval(result.interval)
    images = images_of(result.n, item.data)
    return f"{percent(result.accuracy, 1)}%", name, f"{low_high}; {images}"


def _training_cost(run: TrainingRun | None, seconds: float | None) -> list[tuple[str, ...]]:
    """Rows of phase, epochs, images/s, time, and the part of it for scoring."""
    rows: list[tuple[str, ...]] = []
    begin = 0.0
    for phase, group in groupby(run.epochs if run else (), key=lambda row: row.get("phase")):
        rows_of_phase = list(group)
        end = finite(rows_of_phase[-1].get("seconds"))
        spent = None if end is None else end - begin
        begin = begin if end is None else end
        scoring = _sum(rows_of_phase, "scoring_seconds")
        speeds = [finite(row.get("images_per_second")) for row in rows_of_phase]
        known = [speed for speed in speeds if speed]
        # The harmonic mean, as every epoch has the same number of images.
        mean = len(known) / sum(1 / speed for speed in known) if known else None
        rows.append(
            (
                f"{phase} phase",
                count(len(rows_of_phase)),
                count(mean),
                duration(spent),
                duration(scoring),
            )
        )
    if rows and seconds is not None:
        scoring = _sum(run.epochs if run else (), "scoring_seconds")
        epochs = len(run.epochs) if run else 0
        rows.append(("all", count(epochs), "–", duration(seconds), duration(scoring)))
    return rows


def _sum(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [finite(row.get(name)) for row in rows]
    return sum(value for value in values if value is not None) if any(values) else None
