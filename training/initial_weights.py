"""The initial weights of a run, from any checkpoint that `load_checkpoint` reads."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from robust.checkpoint import Checkpoint
from robust.classifier import Architecture, Classifier
from robust.networks import family_of
from training.state import TrainingError

logger = logging.getLogger(__name__)

_SHAPES = ("arch", "stem", "variant")  # determine names and shapes of the weights
_FUNCTION = ("activation", "mean", "std")  # determine what the weights compute
IMAGENET_CLASSES = 1000


def load_initial_weights(model: Classifier, init: Checkpoint, classes: Sequence[str]) -> str:
    """Copy the weights of `init` into `model`; returns a description of what was copied.

    The head is copied only if its classes are `classes`, or as many if one side has only numbers
    for names; a warning says if as many have other names. Activation, mean and std may differ if
    they were only guessed for `init`. Raises TrainingError for any other difference of the
    architectures, and for a model that is not weights.
    """
    ours, theirs = model.architecture, init.sidecar.architecture
    guessed = init.guessed
    if theirs.stem == "own":
        raise TrainingError(
            f"{init.path}: expected weights of a ResNet, PreActResNet or WideResNet of "
            f"robust.networks, got a {theirs.arch} model"
        )
    _check_same(init, ours, theirs, guessed)
    weights, own = init.classifier.state_dict(), model.state_dict()
    head = f"net.{family_of(ours.arch).head(model.net)}."
    known = init.sidecar.classes
    keep_head = _same_classes(known, classes)
    new = {key for key in own if key.startswith(head) and not keep_head}
    model.load_state_dict({key: own[key] if key in new else weights[key] for key in own})
    parts = [f"{init.path}: took {len(own) - len(new)} of {len(own)} tensors"]
    if new:
        others = " others" if len(known) == len(classes) else ""
        parts.append(f"new head for {len(classes)} classes, as the file has {len(known)}{others}")
        if others:
            logger.warning(
                "%s: its head is not used, as its classes %s are not %s",
                init.path,
                ", ".join(known),
                ", ".join(classes),
            )
    elif not _numbered(known) and tuple(known) != tuple(classes):
        parts.append(f"took 0, 1, ... for its classes {', '.join(known)}; --classes names them")
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
    if len(theirs) != len(ours):
        return False
    return tuple(theirs) == tuple(ours) or _numbered(theirs) or _numbered(ours)


def _numbered(names: Sequence[str]) -> bool:
    return all(name == str(k) for k, name in enumerate(names))


def _words(architecture: Architecture, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {_value(getattr(architecture, name))}" for name in names)


def _options(architecture: Architecture, names: Sequence[str]) -> list[str]:
    return [f"--set {name}={_value(getattr(architecture, name))}" for name in names]


def _value(value: Any) -> str:
    """As `--set` reads it back exactly: 0 and 0.4914001, not 0.0 and 0.4914."""
    if isinstance(value, tuple):
        return ",".join(repr(item).removesuffix(".0") for item in value)
    return str(value)
