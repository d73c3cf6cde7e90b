"""The section of a report on whether its numbers can be trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from robust.report.document import Block, Notice, Section, Text
from robust.report.evaluations import Measurement
from robust.report.examples import Surface
from robust.report.words import count, finite, images_of, listed

FEW = 1000  # images below which the interval is up to 6 points wide or wider


def trust(measurements: Sequence[Measurement], surfaces: Sequence[Surface] | None) -> Section:
    """Flags, notes, and what was not checked; `surfaces` is None if no images were given."""
    blocks: list[Block] = [*_flags(measurements)]
    checked = [item for item in measurements if item.probes is not None]
    if checked and not blocks:
        text = (
            "The checks of the evaluation found no sign of masked gradients, of random outputs, or "
            "of an attack that fails where it should not."
        )
        blocks.append(Notice(kind="good", title="No sign of a problem", text=text))
    blocks += _limits(measurements, surfaces)
    for item in checked:
        blocks.append(Text(text=_probes(item)))
    for item in measurements:
        for note in item.notes:
            blocks.append(Notice(kind="note", title=item.source, text=f"{note}."))
    return Section(title="Can the numbers be trusted?", blocks=tuple(blocks))


def _flags(measurements: Sequence[Measurement]) -> Iterator[Notice]:
    for item in measurements:
        for flag in item.flags:
            advice = f" What to do: {flag['advice']}." if flag["advice"] else ""
            text = f"In {item.source}: {flag['text']}.{advice}"
            yield Notice(kind="warning", title=f"Flag: {flag['name']}", text=text)


def _limits(
    measurements: Sequence[Measurement], surfaces: Sequence[Surface] | None
) -> Iterator[Notice]:
    if any(item.recorded for item in measurements):
        yield Notice(
            kind="note",
            title="Recorded accuracies",
            text="No evaluation was given, so the accuracies are those in the checkpoint's "
            "sidecar, which has no curve, confusion matrix or checks.",
        )
    if not measurements:
        text = "No evaluation was given and the sidecar has none: the accuracy is unknown."
        yield Notice(kind="warning", title="Not evaluated", text=text)
        return
    attacks = {result.attack for item in measurements for result in item.attacks}
    if not any(name.startswith("autoattack") for name in attacks):
        shown = listed(sorted(attacks)) or "no attack"
        stronger = "published figures use AutoAttack"
        if all(item.without_gradients for item in measurements):
            stronger = (
                "AutoAttack needs gradients, which this model does not give, so run square with "
                "more queries and restarts"
            )
        yield Notice(
            kind="note",
            title="No AutoAttack",
            text=f"The only attacks were {shown}. A stronger attack fools more images, so the "
            f"robust accuracy is an upper bound; {stronger}.",
        )
    for item in measurements:
        if item.n < FEW:
            yield Notice(
                kind="note",
                title="Few images",
                text=f"{item.source} scored {images_of(item.n, item.data)}: compare "
                "intervals, not only accuracies.",
            )
    if surfaces:
        odd = [surface for surface in surfaces if not surface.follows_gradient]
        if odd:
            yield Notice(
                kind="warning",
                title="Loss surface",
                text=f"Around {len(odd)} of {len(surfaces)} images the loss does not rise most "
                "along the gradient, which may be masked. Run autoattack, and look at square.",
            )


def _probes(item: Measurement) -> str:
    probes = item.probes or {}
    n = count(probes.get("n"))
    difference = finite(probes.get("difference"))
    normalized = probes.get("right_normalized", probes.get("right_normalised"))  # older results
    known = normalized is not None
    same = (
        "the same logits in two passes"
        if not difference or difference < 1e-4
        else f"logits that differ by {difference:.1%} of the largest in two passes"
    )
    gradients = (
        f"of {count(probes.get('differentiated')) or n} of them "
        f"{count(probes.get('zero_gradients'))} had a gradient of zero and "
        f"{count(probes.get('nan_gradients'))} had NaN in it"
    )
    if item.without_gradients:
        gradients = "it gives no gradients"
    return (
        f"{item.source}: the model computed {same} over {n} probe images; {gradients}. "
        f"{count(probes.get('right'))} were classified correctly"
        + (f", and at most {count(normalized)} when normalized a second time." if known else ".")
    )
