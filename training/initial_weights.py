"""The initial weights of a run, from any checkpoint that `load_checkpoint` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robust.checkpoint import Checkpoint
from robust.classifier import Architecture, Classifier
from robust.networks import family_of
from training.state import TrainingError

_SHAPES = ("arch", "stem", "variant")  # decide names and shapes of the weights
_MEANING = ("activation", "mean", "std")  # decide what the weights compute
IMAGENET_CLASSES = 1000


def load_initial_weights(model: Classifier, init: Checkpoint, classes: Sequence[str]) -> str:
    """Copy the weights of `init` into `model`; returns a description of what was copied.

    The head is copied only if its classes are `classes`, or are the same number of unnamed ones.
    Activation, mean and std come from `model` if the file of `init` does not have them. Raises
    TrainingError if the architectures differ otherwise.
    """
    ours, theirs = model.architecture, init.sidecar.architecture
    guessed: Mapping[str, str] = getattr(init, "guessed", {})
    _check_same(init, ours, theirs, guessed)
    weights, own = init.classifier.state_dict(), model.state_dict()
    head = f"net.{family_of(ours.arch).head(model.net)}."
    keep_head = _same_classes(init.sidecar.classes, classes)
    new = {key for key in own if key.startswith(head) and not keep_head}
    model.load_state_dict({key: own[key] if key in new else weights[key] for key in own})
    said = [f"{init.path}: took {len(own) - len(new)} of {len(own)} tensors"]
    if new:
        said.append(
            f"the head is new, for {len(classes)} classes where the file has "
            f"{theirs.num_classes}{' others' if theirs.num_classes == len(classes) else ''}"
        )
    if theirs.input_size != ours.input_size:
        said.append(f"trained on at {ours.input_size} pixels, where it had {theirs.input_size}")
    unsaid = [name for name in _MEANING if name in guessed]
    if unsaid:
        said.append(f"{', '.join(unsaid)} as the recipe says, which the file does not")
    if "mean" in guessed and theirs.num_classes == IMAGENET_CLASSES and not ours.normalizes:
        said.append("if it was trained on ImageNet, add --set mean=imagenet")
    return "; ".join(said)


def _check_same(
    init: Checkpoint, ours: Architecture, theirs: Architecture, guessed: Mapping[str, str]
) -> None:
    compared = (*_SHAPES, *(name for name in _MEANING if name not in guessed))
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
