"""Sets up a run before its first step: its manifest, its state and its model."""

from __future__ import annotations

import logging
from typing import Any

import torch

from robust import files
from robust.checkpoint import Checkpoint
from robust.classifier import Architecture, Classifier
from robust.datasets import Dataset
from robust.distributed import World
from robust.sidecar import Sidecar
from training.initial_weights import load_initial_weights
from training.recipe import Recipe
from training.recipe_values import recipe_from_values
from training.state import RunFolder, RunState, TrainingError, load_state

logger = logging.getLogger(__name__)


def make_manifest(
    recipe: Recipe,
    dataset: Dataset,
    *,
    seed: int,
    init: Checkpoint | None,
    validation: Dataset | None = None,
) -> dict[str, Any]:
    """Everything that must match for a run to be resumed, as JSON values."""
    return {
        "recipe": recipe.to_dict(),
        "data": _record(dataset),
        "validation": validation and _record(validation),
        "seed": seed,
        "init": init and init.sha256,  # of the initial weights
    }


def _record(dataset: Dataset) -> dict[str, Any]:
    return {"name": dataset.name, "count": len(dataset), "sha256": dataset.sha256}


def check_ranks(world: World, recipe: Recipe, manifest: dict[str, Any]) -> None:
    """Raise TrainingError unless all ranks start the same run and can share a batch."""
    for rank, other in enumerate(world.gather(manifest)):
        for key, value in other.items():
            if value != manifest[key]:
                raise TrainingError(
                    f"expected the same recipe, data, seed and init for every process, found "
                    f"another {key} for process {rank + 1} of {world.size}"
                )
    if recipe.batch_size < 2 * world.size:
        raise TrainingError(
            f"expected at least 2 images of a batch for each process, got a batch_size of "
            f"{recipe.batch_size} for {world.size}"
        )


def open_run(
    folder: RunFolder,
    manifest: dict[str, Any],
    *,
    init: Checkpoint | None,
    resume: bool,
    minutes: float | None = None,
) -> tuple[dict[str, Any], RunState | None]:
    """The manifest and the state to resume from; no state if the run is finished.

    A run fitted by `--minutes` resumes with the epochs in its manifest, if its state was saved or
    no `minutes` are given. Raises TrainingError if an
    unfinished run would be lost, or if `resume` finds a different run.
    """
    saved = folder.read_manifest()
    if resume and not saved and folder.state.exists():
        raise TrainingError(
            f"{folder.state}: expected {folder.manifest.name} of the same run in the same folder, "
            "found none; remove that folder to start over"
        )
    if resume and saved:
        if _is_own_result(init, folder, saved):
            manifest = {**manifest, "init": saved["init"]}
        fitted = saved.get("minutes")
        if minutes is not None and minutes != (fitted or {}).get("given"):
            raise TrainingError(
                f"{folder.path}: expected to resume with the --minutes it was started with, "
                f"{fitted['given'] if fitted else 'none'}, got {minutes:g}"
            )
        for key, value in files.from_json(files.to_json(manifest)).items():
            found = saved.get(key)
            if key == "recipe":
                found = _with_defaults(_as_requested(saved["recipe"], fitted))
            if found != value:
                raise TrainingError(
                    f"{folder.path}: expected to resume with the same recipe, data, seed and "
                    f"init, found another {key}: {_difference(found, value)}"
                )
        # A run killed before its first save starts over; with --minutes it is fitted again.
        if fitted and (minutes is None or saved.get("finished") or folder.state.exists()):
            manifest = {**manifest, "recipe": saved["recipe"], "minutes": fitted}
        if saved.get("finished"):
            return manifest, None
        if folder.state.exists():
            return manifest, load_state(folder.state)
    if resume:
        logger.info("%s: nothing to resume; the run starts from the beginning", folder.path)
    elif folder.state.exists():
        raise TrainingError(
            f"{folder.path}: contains an unfinished run; continue it with --resume, or remove that "
            "folder to start over"
        )
    return manifest, RunState()


def _difference(found: Any, value: Any, path: str = "") -> str:
    """The first field that differs, as in ``batch_size 64 instead of 32``."""
    if isinstance(found, dict) and isinstance(value, dict):
        for name in {**value, **found}:
            if found.get(name) != value.get(name):
                field = f"{path}.{name}".lstrip(".")
                return _difference(found.get(name), value.get(name), field)
    if isinstance(found, list) and isinstance(value, list) and len(found) == len(value):
        for index, (one, other) in enumerate(zip(found, value, strict=True)):
            if one != other:
                # Phases have names, by which `--set` calls them too.
                named = isinstance(one, dict) and "name" in one
                return _difference(one, other, one["name"] if named else f"{path}.{index}")
    return f"{path} {found!r:.60} instead of {value!r:.60}".lstrip()


def _as_requested(recipe: dict[str, Any], fitted: dict[str, Any] | None) -> dict[str, Any]:
    """The recipe of a manifest with its original epochs, before `--minutes` fitted them."""
    if not fitted:
        return recipe
    phases = [{**phase, "epochs": fitted["epochs"][phase["name"]]} for phase in recipe["phases"]]
    return {**recipe, "phases": phases}


def _with_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recorded recipe with the fields that did not exist when it was written."""
    try:
        return dict(files.from_json(files.to_json(recipe_from_values(recipe).to_dict())))
    except ValueError:
        return recipe


def _is_own_result(init: Checkpoint | None, folder: RunFolder, saved: dict[str, Any]) -> bool:
    """Whether `init` is the run's own result, which overwrote its initial weights."""
    return (
        init is not None
        and init.path.resolve() == folder.out.resolve()
        and saved.get("init") == init.sidecar.recipe.get("init")
        and saved.get("init") is not None
    )


def build_model(
    recipe: Recipe,
    dataset: Dataset,
    *,
    seed: int,
    init: Checkpoint | None,
    validation: Dataset | None = None,
) -> Classifier:
    """The classifier with its initial weights: random from `seed`, or those of `init`.

    Raises TrainingError if `init` has another architecture.
    """
    architecture = Architecture(
        arch=recipe.arch,
        stem=recipe.stem,
        activation=recipe.activation,
        variant=recipe.variant,
        num_classes=len(dataset.classes),
        input_size=recipe.input_size,
        mean=recipe.mean,
        std=recipe.std,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(architecture)
    if recipe.zero_init_residual:
        model.zero_residuals()
    if init is not None:
        logger.info("%s", load_initial_weights(model, init, dataset.classes))
        if validation is None:
            warn_about_seen_images(init.sidecar, dataset, recipe.held_out, seed=seed)
    return model


def warn_about_seen_images(
    earlier: Sidecar, dataset: Dataset, held_out: float, *, seed: int
) -> None:
    """Warn if the run of `earlier` trained on images of `dataset` that are held out now."""
    if earlier.data is None or earlier.data.sha256 != dataset.sha256:
        return
    before = earlier.recipe.get("held_out", held_out)
    if earlier.recipe.get("validation"):  # nothing was held out
        logger.warning(
            "the weights were trained on all images of %s, also on those held out now, so scores "
            "will be too high; use --val as before",
            dataset.name,
        )
        return
    options = [f"--seed {earlier.seed}"] if earlier.seed != seed else []
    if before < held_out:  # a smaller share is a part of that before
        options.append(f"--set held_out={before}")
    if options:
        logger.warning(
            "the weights were trained on some of the images that are held out now; "
            "with %s the same images are held out as before",
            " ".join(options),
        )
