"""The parts of a report that show a few images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from robust.images import encode_png
from robust.prediction import AttackOutcome, top_classes
from robust.report import plots
from robust.report.document import Cell, Picture, Plot, Section, Table, Text
from robust.report.examples import Examples, Surface
from robust.report.words import decimal, images_of, percent
from robust.threat_model import format_eps

SHOWN = 128  # pixels a side, because viewers that enlarge an image smooth it
_NO_DATA = "No images to show: no data was given (--data)."


def gallery(examples: Examples | None) -> Section:
    """Images, perturbations, and predictions before and after."""
    title = "A few images"
    if examples is None:
        return Section(title=title, blocks=(Text(text=_NO_DATA),))
    settings = examples.settings
    text = (
        f"{images_of(len(examples.outcomes), examples.data.name)}, not selected by outcome, "
        f"attacked with {settings.label} within {settings.threat_model}. Perturbations are "
        "amplified to the full range; gray means no change. Predictions are those of the image "
        "rounded to 8 bits."
    )
    classes = examples.data.classes
    rows = tuple(
        _row(k, outcome, image, classes)
        for k, (outcome, image) in enumerate(
            zip(examples.outcomes, examples.data.images, strict=True)
        )
    )
    header = ("image", "class", "original", "added", "result", "before", "after", "outcome")
    table = Table(caption=f"{settings.label} on each image", header=header, rows=rows)
    return Section(title=title, blocks=(Text(text=text), table))


def _row(k: int, outcome: AttackOutcome, image: Tensor, classes: Sequence[str]) -> tuple[Cell, ...]:
    label = classes[outcome.label]
    pictures = (
        (image, f"image {k + 1}, of class {label}"),
        (outcome.perturbation, f"the perturbation of image {k + 1}, amplified"),
        (outcome.image, f"image {k + 1} with the perturbation"),
    )
    return (
        str(k + 1),
        label,
        *(Picture(png=encode_png(_enlarge(pixels)), alt=alt) for pixels, alt in pictures),
        _top_class(outcome.before, classes),
        _top_class(outcome.after, classes),
        _outcome(outcome),
    )


def _enlarge(pixels: Tensor) -> Tensor:
    times = max(1, SHOWN // pixels.shape[-1])
    return pixels.cpu().repeat_interleave(times, dim=1).repeat_interleave(times, dim=2)


def _top_class(probabilities: Tensor, classes: Sequence[str]) -> str:
    (best,) = top_classes(probabilities, classes, 1)
    return f"{best.label} {percent(best.probability, 0)}%"


def _outcome(outcome: AttackOutcome) -> str:
    if outcome.already_wrong:
        return "misclassified before"
    if not outcome.success:
        return "robust"
    return f"fooled, linf {format_eps(outcome.linf)}, l2 {outcome.l2:.2f}"


def surface(examples: Examples | None) -> Section:
    """The loss around some of the images."""
    title = "The loss around an image"
    if examples is None:
        return Section(title=title, blocks=(Text(text=_NO_DATA),))
    surfaces, threat_model = examples.surfaces, examples.settings.threat_model
    if not surfaces:
        text = (
            "None of the images above was classified correctly before the attack."
            if examples.settings.uses_gradient
            else "The model gives no gradients, which this needs."
        )
        return Section(title=title, blocks=(Text(text=text),))
    eps_text = format_eps(threat_model.eps)
    text = (
        "The loss around the image (cross) along two directions: the gradient, which an attack "
        "follows, and a random one. Gradient attacks work if the loss rises evenly to the right "
        "and hardly changes up and down; ridges, spikes or a flat center would mislead them. The "
        "white line is the decision boundary."
    )
    classes = examples.data.classes
    plot = Plot(
        caption=f"Cross-entropy within {threat_model} of {len(surfaces)} correctly classified "
        "images; axes in units of eps",
        alt="Maps of the loss. "
        + " ".join(
            f"Image {item.number + 1}: {decimal(item.at_image, 2)} at the image, "
            f"{decimal(item.along_gradient, 2)} along the gradient, "
            f"{decimal(item.at_random, 2)} at random."
            for item in surfaces
        ),
        svg=plots.loss_surfaces(
            [f"image {item.number + 1}, {classes[item.label]}" for item in surfaces],
            [item.loss for item in surfaces],
            [item.margin for item in surfaces],
        ),
    )
    header = (
        *("image", "class", "loss at the image", "along the gradient", "at random"),
        *("highest", "rise", "predicted by the slope", "verdict"),
    )
    table = Table(
        caption=f"The loss at a distance of {eps_text}",
        header=header,
        rows=tuple(_surface_row(item, classes) for item in surfaces),
    )
    return Section(title=title, blocks=(Text(text=text), plot, table))


def _surface_row(item: Surface, classes: Sequence[str]) -> tuple[str, ...]:
    values: list[Any] = [item.at_image, item.along_gradient, item.at_random, item.loss.max()]
    values += [item.along_gradient - item.at_image, item.expected]
    verdict = "follows the gradient" if item.follows_gradient else "gradient misleads"
    shown = (decimal(float(value), 2) for value in values)
    return (str(item.number + 1), classes[item.label], *shown, verdict)
