"""Turns options of `robust train` into images and a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

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


def differences_from(
    recorded: Mapping[str, Any], manifest: Mapping[str, Any], classes: tuple[str, ...]
) -> list[str]:
    """What keeps a run from repeating a recorded one with the same recipe, one line each.

    `manifest` is that of the run, see `make_manifest`; `recorded` is the result of `recorded_run`.
    For other images only the seed is compared.
    """
    lines = []
    seed, data, before = recorded.get("seed"), recorded.get("data"), recorded.get("validation")
    if seed not in (None, manifest["seed"]):
        lines.append(f"used --seed {seed}, this run uses {manifest['seed']}")
    same = isinstance(data, Mapping) and any(
        data.get(key) == manifest["data"][key] for key in ("name", "sha256")
    )
    if not same:
        return lines
    if recorded.get("init") != manifest["init"]:
        weights = "weights of a file" if recorded.get("init") else "random weights"
        lines.append(f"started from {weights}, this run from others (--init)")
    if "validation" in recorded and before != manifest["validation"]:
        used, uses = (item["name"] if item else "none" for item in (before, manifest["validation"]))
        lines.append(f"used --val {used}, this run uses {uses}")
    if tuple(recorded.get("classes", classes)) != classes:
        used, uses = (",".join(names) for names in (recorded["classes"], classes))
        lines.append(f"used --classes {used}, this run uses {uses}")
    fitted = (recorded.get("minutes") or {}).get("fitted_steps")
    if fitted:
        steps = ", ".join(f"{count} of {name}" for name, count in fitted.items())
        lines.append(f"had its steps fitted by --minutes ({steps}), this run has whole epochs")
    return lines
