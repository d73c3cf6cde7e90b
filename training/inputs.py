"""Turns options of `robust train` into images and a recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from robust.attacks import DEFAULT_EPS
from robust.datasets import Dataset, check_trainable, load_dataset
from robust.datasets.registry import by_name
from robust.matching import match_classes
from robust.threat_model import Norm
from training.folder_layout import check_layout
from training.recipe import Phase, Recipe


def load_images(source: str, *, size: int, classes: tuple[str, ...] = ()) -> Dataset:
    """Labeled 8-bit images in any format of `load_dataset`, with labels in the order of `classes`.

    Class names in the data are matched with `classes`; without names, labels are assumed to be in
    that order. `Dataset.changes` records floats that were rounded. Raises DatasetError, also for
    images of a single class, and for a folder of splits, where it names the option for each.
    """
    if source not in by_name():
        check_layout(Path(source))
    dataset = load_dataset(source, size=size).in_8_bits()
    check_trainable(dataset)
    return match_classes(dataset, classes) if classes else dataset


def with_threat_model(recipe: Recipe, norm: Norm | None, eps: float | None) -> Recipe:
    """The recipe with another threat model; step sizes in pixel units are scaled with eps.

    Without `eps` the radius stays, or becomes the default of the new norm. Raises ValueError for
    an eps that the norm does not allow.
    """
    norm = norm or recipe.norm
    if eps is None:
        eps = recipe.eps if norm == recipe.norm else DEFAULT_EPS[norm]
    scale = eps / recipe.eps if recipe.eps else 1.0

    def scaled(phase: Phase) -> Phase:
        parts = tuple(replace(part, alpha=part.alpha * scale) for part in phase.parts)
        return replace(phase, parts=parts)

    if (norm, eps) == (recipe.norm, recipe.eps):
        return recipe
    return replace(recipe, norm=norm, eps=eps, phases=tuple(map(scaled, recipe.phases)))
