"""Warnings that the numbers of an evaluation may be unreliable.

A failed attack says little about the model: its gradients may be masked, its output random, or its
inputs wrong. Sources: Athalye et al. 2018, arXiv:1802.00420; Carlini et al. 2019,
arXiv:1902.06705; Croce, Hein 2020, arXiv:2003.01690.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from robust.attacks import AttackSettings
from robust.evaluation.intervals import wilson_interval
from robust.evaluation.result import Accuracy, Evaluation, Flag, Probes
from robust.threat_model import Norm, format_eps

FEWEST = 20  # fewest correctly classified images for a conclusion
# Budgets at which any known model has some image that can be fooled.
LEAST_EPS: dict[Norm, float] = {"linf": 2 / 255, "l2": 0.25}
GRAY = 128 / 255  # a change that can turn every pixel, and so every image, into the same gray
RANDOM = 1e-4  # largest allowed difference of two passes, relative to the largest logit
FLAT = 0.05  # largest allowed share of images without a gradient
MANY_STEPS = 10  # of an attack that Square should not beat
SQUARE_GAIN = 0.002  # accuracy that Square may remove after all gradient attacks of AutoAttack
SQUARE_LEAD = 0.02  # accuracy by which it may beat a single gradient attack
KEPT = 0.75  # if FGSM accuracy is at least this share of clean accuracy,
COLLAPSE = 0.4  # PGD accuracy should be at least this share of FGSM's
UNCONFIRMED = 0.002  # largest allowed share of images with an unconfirmed success


SEEN_IMAGES = Flag(
    name="training-data",
    text="these are the images that the model was trained on",
    advice="evaluate on other images",
)


# Advice for a model that no gradient attack, and so no AutoAttack, can be run on.
WITHOUT_GRADIENTS = (
    "unless this data is very easy, its queries are too few and the accuracy says nothing: run "
    "square with more queries and restarts"
)


def large_eps(norm: Norm, shape: Sequence[int]) -> float:
    """An eps that no classifier of images (C, H, W) can resist: all can become the same gray."""
    return GRAY if norm == "linf" else GRAY * math.sqrt(math.prod(shape))


def find_flags(evaluation: Evaluation) -> tuple[Flag, ...]:
    """The flags of an evaluation, one per problem; empty if the numbers look sound."""
    found = list(_of_model(evaluation))
    if evaluation.clean.correct >= FEWEST:
        found += [*_of_attacks(evaluation), *_of_stages(evaluation), *_of_curve(evaluation)]
    return tuple(found)


def fewest_significant(right: int, n: int) -> int:
    """Fewest correct images out of `n` that are significantly more than `right`; n + 1 if none."""
    _, highest = wilson_interval(right, n)
    return next((k for k in range(n + 1) if wilson_interval(k, n)[0] > highest), n + 1)


def notes(stages: Sequence[AttackSettings], num_classes: int) -> tuple[str, ...]:
    """Changes to attacks that the small number of classes requires."""
    others, found = num_classes - 1, []
    targets = {stage.name: stage.entry.targets for stage in stages}
    for name, wanted in targets.items():
        if wanted > others:
            plural = "es" if others > 1 else ""
            found.append(f"{name}: tries {others} target class{plural}, not {wanted}")
    for name in ("apgd-t", "malt"):
        if name in targets and others < 3:
            found.append(f"{name}: maximizes the margin, as its loss needs 4 classes")
    return tuple(found)


def class_notes(n: int, classes: int, num_classes: int) -> tuple[str, ...]:
    """A note if `n` images are of fewer classes than the model has, and not by chance."""
    by_chance = n < 10 * num_classes if classes > 1 else n < FEWEST
    if classes == num_classes or by_chance:
        return ()
    return (f"the images are of {classes} of the model's {num_classes} classes",)


def _of_model(evaluation: Evaluation) -> Iterator[Flag]:
    probes, clean = evaluation.probes, evaluation.clean
    classes = len(clean.per_class)
    if probes is not None:
        yield from _of_probes(probes, chance=1 / max(1, classes))
    low, high = clean.interval
    if clean.n >= FEWEST and classes > 1 and high < 1 / classes:
        yield Flag(
            name="chance",
            text=f"{clean.correct} of {clean.n} clean images are classified correctly, fewer than "
            "by chance",
            advice="the images are adversarial already, or the labels or the order of classes are "
            "wrong",
        )
    elif clean.n >= FEWEST and classes > 1 and low <= 1 / classes:
        yield Flag(
            name="chance",
            text=f"{clean.correct} of {clean.n} clean images are classified correctly, no more "
            "than by chance",
            advice="check labels, order of classes, pixel range and normalization first",
        )
    unconfirmed = sum(item.unconfirmed for item in evaluation.attacks)
    if unconfirmed > max(1, UNCONFIRMED * evaluation.n):
        yield Flag(
            name="unconfirmed",
            text=f"{unconfirmed} adversarial images did not fool the exact model",
            advice="evaluate with precision fp32, and check that two passes over the same image "
            "give the same logits",
        )


def _of_probes(probes: Probes, *, chance: float) -> Iterator[Flag]:
    if probes.difference > RANDOM:
        yield Flag(
            name="randomized",
            text="two passes over the same image differ by "
            f"{probes.difference:.1%} of the largest logit",
            advice="turn off dropout, noise and random transforms, or average over many passes",
        )
    if probes.probabilities:
        yield Flag(
            name="probabilities",
            text="the model returns probabilities instead of logits",
            advice="remove its softmax: where it saturates, gradients vanish",
        )
    if probes.sigmoid:
        yield Flag(
            name="sigmoid",
            text="all outputs are in [0, 1], as after a sigmoid",
            advice="attack the logits: where the sigmoid saturates, gradients vanish",
        )
    flat, seen = probes.zero_gradients, probes.differentiated or probes.n
    if flat > FLAT * seen or probes.nan_gradients:
        yield Flag(
            name="gradients",
            text=f"of {seen} images {flat} have a gradient of zero and "
            f"{probes.nan_gradients} have NaN in it",
            advice="gradient attacks fail there: look for saturation, rounding or masking, and "
            "rely on square and on attacks on the margin (apgd-dlr, apgd-t)",
        )
    if probes.right_normalized is None:
        return
    # Accuracy below chance means adversarial images: any change undoes their perturbation.
    below_chance = wilson_interval(probes.right, probes.n)[1] < chance
    significant = fewest_significant(probes.right, probes.n)
    if probes.n >= FEWEST and not below_chance and probes.right_normalized >= significant:
        yield Flag(
            name="normalization",
            text=f"{probes.right_normalized} of {probes.n} images are classified correctly when "
            f"normalized as for {probes.normalization}, but {probes.right} as given",
            advice="unless the images are adversarial already, put the normalization inside the "
            "model: eps is in pixels of [0, 1]",
        )


def _of_attacks(evaluation: Evaluation) -> Iterator[Flag]:
    clean = evaluation.clean.correct
    for item in evaluation.attacks:
        if item.correct == clean and _should_fool(evaluation, item):
            yield Flag(
                name="no effect",
                text=f"{item.label} fooled none of {clean} images",
                advice=WITHOUT_GRADIENTS
                if evaluation.probes is not None and evaluation.probes.differentiated == 0
                else "unless this data is very easy, gradients are masked or the attack is "
                "broken, and the accuracy says nothing: run autoattack",
            )
    for weak in evaluation.attacks:
        for strong in evaluation.attacks:
            if _is_single(weak) and _is_iterated(strong) and _same_ball(weak, strong):
                yield from _of_pair(evaluation, weak, strong)


def _should_fool(evaluation: Evaluation, item: Accuracy) -> bool:
    """Whether an attack that fooled no image should have, given the other results.

    On easy data and a small set a sound attack may fool no image: then other attacks fool hardly
    any, or accuracy falls at a larger eps.
    """
    settings, clean = _settings(item), evaluation.clean.correct
    ball = settings.threat_model
    if ball.eps < LEAST_EPS[ball.norm]:
        return False
    others = [other for other in evaluation.attacks if _same_ball(item, other)]
    fooled = max(clean - other.correct for other in others)
    points = evaluation.curve if _settings(evaluation.attacks[0]).threat_model == ball else ()
    for point in points:
        if point.eps == ball.eps:
            fooled = max(fooled, points[0].correct - point.correct)
    if fooled:
        # A failed attack without gradients says nothing: its queries may be too few.
        return settings.uses_gradient and fooled > max(2, clean // 20)
    return not points or 2 * points[-1].correct > points[0].correct


def _of_pair(evaluation: Evaluation, weak: Accuracy, strong: Accuracy) -> Iterator[Flag]:
    gap = strong.correct - weak.correct
    if gap > max(2, evaluation.n // 100):
        yield Flag(
            name="single step stronger",
            text=f"{strong.label} fooled {gap} fewer images than the single step of {weak.label}",
            advice="its steps are too small, or gradients are masked: run autoattack and look at "
            "square",
        )
    # After catastrophic overfitting to single-step attacks, a model keeps nearly all its accuracy
    # under one step and almost none under several. An undefended model loses it under one step too.
    if weak.correct > KEPT * evaluation.clean.correct and strong.correct < COLLAPSE * weak.correct:
        yield Flag(
            name="single step only",
            text=f"{weak.label} fooled {-gap} fewer images than {strong.label}",
            advice="the model has learned to resist a single step only (catastrophic overfitting): "
            "do not report the accuracy under fgsm, and train with more steps or noise",
        )


def _of_stages(evaluation: Evaluation) -> Iterator[Flag]:
    for item in evaluation.attacks:
        stages = zip(item.stages, _settings(item).stages, strict=False)  # some may not have run
        for (before, _), (after, settings) in pairwise(stages):
            taken = before.correct - after.correct
            if _is_random_search(settings) and taken > max(1, SQUARE_GAIN * item.n):
                yield Flag(
                    name="square stronger",
                    text=f"square, which uses no gradient, fooled {taken} images that the "
                    "gradient attacks did not",
                    advice="the gradients are masked: give square more queries and restarts, and "
                    "write an attack for this model",
                )
    for item in evaluation.attacks:
        if not _is_random_search(_settings(item)):
            continue
        others = [a.correct for a in evaluation.attacks if _is_thorough(a) and _same_ball(a, item)]
        gap = min(others, default=0) - item.correct
        if gap > max(2, SQUARE_LEAD * item.n):
            yield Flag(
                name="square stronger",
                text=f"{item.label}, a random search, fooled {gap} more images than the gradient "
                "attacks",
                advice="the gradients are masked: run autoattack, or write an attack for it",
            )


def _of_curve(evaluation: Evaluation) -> Iterator[Flag]:
    points = evaluation.curve
    if not points:
        return
    for before, after in pairwise(points):
        if after.correct - before.correct > max(2, after.n // 50):
            yield Flag(
                name="not monotone",
                text=f"accuracy rises from {before.correct} to {after.correct} of {after.n} as "
                f"eps grows from {format_eps(before.eps)} to {format_eps(after.eps)}",
                advice="the attack is stuck, as a larger ball can only help it: try more steps and "
                "restarts, another loss, and square",
            )
    last, sizes = points[-1], [n for _, n in evaluation.clean.per_class]
    low, _ = wilson_interval(last.correct, last.n)
    # There all images can be the same gray, so at best those of one class are correct.
    if low > max(sizes) / sum(sizes):
        yield Flag(
            name="large eps",
            text=f"{last.correct} of {last.n} images are classified correctly even at eps "
            f"{format_eps(last.eps)}, where all images can be made the same",
            advice="the attack misses adversarial images that must exist: gradients are masked",
        )


def _settings(item: Accuracy) -> AttackSettings:
    assert item.attack is not None
    return item.attack


def _is_single(item: Accuracy) -> bool:
    return _settings(item).uses_gradient and _settings(item).steps == 1


def _is_iterated(item: Accuracy) -> bool:
    settings = _settings(item)
    return settings.uses_gradient and not _is_single(item) and not _is_random_search(settings)


def _is_random_search(settings: AttackSettings) -> bool:
    """Whether it is Square, which `square-check` only precedes by gradient steps."""
    stages = settings.stages
    return all(not stage.uses_gradient or stage.name == "square-check" for stage in stages)


def _is_thorough(item: Accuracy) -> bool:
    settings = _settings(item)
    return _is_iterated(item) and settings.steps * settings.restarts >= MANY_STEPS


def _same_ball(one: Accuracy, other: Accuracy) -> bool:
    return _settings(one).threat_model == _settings(other).threat_model
