"""The initial weights of a run, from any checkpoint that `load_checkpoint` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robust.checkpoint import Checkpoint
from robust.classifier import Architecture, Classifier
from robust.networks import family_of
from training.state import TrainingError

_SHAPES = ("arch", "stem", "variant")  # determine names and shapes of the weights
_FUNCTION = ("activation", "mean", "std")  # determine what the weights compute
IMAGENET_CLASSES = 1000


def load_initial_weights(model: Classifier, init: Checkpoint, classes: Sequence[str]) -> str:
    """Copy the weights of `init` into `model`; returns a description of what was copied.

    The head is copied only if its classes are `classes`, or as many unnamed ones. Activation, mean
    and std may differ if they were only guessed for `init`. Raises TrainingError for any other
    difference of the architectures.
    """
    ours, theirs = model.architecture, init.sidecar.architecture
    guessed = init.guessed
    _check_same(init, ours, theirs, guessed)
    weights, own = init.classifier.state_dict(), model.state_dict()
    head = f"net.{family_of(ours.arch).head(model.net)}."
    keep_head = _same_classes(init.sidecar.classes, classes)
    new = {key for key in own if key.startswith(head) and not keep_head}
    model.load_state_dict({key: own[key] if key in new else weights[key] for key in own})
    parts = [f"{init.path}: took {len(own) - len(new)} of {len(own)} tensors"]
    if new:
        parts.append(
            f"new head for {len(classes)} classes, as the file has "
            f"{theirs.num_classes}{' others' if theirs.num_classes == len(classes) else ''}"
        )
    if theirs.input_size != ours.input_size:
        parts.append(f"continued at {ours.input_size} instead of {theirs.input_size} pixels")
    unknown = [name for name in _FUNCTION if name in guessed]
    if unknown:
        parts.append(f"{', '.join(unknown)} from the recipe, as the file does not have them")
    if "mean" in guessed and theirs.num_classes == IMAGENET_CLASSES and not ours.normalizes:
        parts.append("if it was trained on ImageNet, add --set mean=imagenet")
    return "; ".join(parts)


def _check_same(
    init: Checkpoint, ours: Architecture, theirs: Architecture, guessed: Mapping[str, str]
) -> None:
    compared = (*_SHAPES, *(name for name in _FUNCTION if name not in guessed))
    differing = [name for name in compared if getattr(ours, name) != getattr(theirs, name)]
    if differing:
        wanted, found = (_words(architecture, differing) for architecture in (ours, theirs))
        raise TrainingError(
            f"{init.path}: expected weights of the recipe's architecture, {wanted}, found {found}; "
            f"change the recipe with {' '.join(_options(theirs, differing))}"
        )


def _same_classes(theirs: Sequence[str], ours: Sequence[str]) -> bool:
    numbered = all(name == str(k) for k, name in enumerate(theirs))
    return tuple(theirs) == tuple(ours) or (numbered and len(theirs) == len(ours))


def _words(architecture: Architecture, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {_value(getattr(architecture, name))}" for name in names)


def _options(architecture: Architecture, names: Sequence[str]) -> list[str]:
    return [f"--set {name}={_value(getattr(architecture, name))}" for name in names]


def _value(value: Any) -> str:
    return ",".join(f"{item:g}" for item in value) if isinstance(value, tuple) else str(value)
