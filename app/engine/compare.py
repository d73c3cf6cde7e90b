"""The comparison model of POST /attack."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from app.engine.served_model import ServedModel, load_model
from robust.checkpoint import CheckpointError
from robust.device import DeviceDisagrees
from robust.evaluation.precision import Precision

logger = logging.getLogger(__name__)


def load_compare(
    path: Path,
    device: torch.device,
    *,
    served: ServedModel,
    required: bool,
    precision: Precision = "fp32",
) -> ServedModel | None:
    """Load the model at `path`, for attacks only.

    If it can't be loaded or doesn't match `served`: logs a warning and returns None, or raises
    CheckpointError if `required`.
    """
    try:
        model = load_model(path, device, attacks_only=True, precision=precision)
        if difference := mismatch(model, served):
            raise CheckpointError(path, f"the same as {served.name}, to compare them", difference)
    except (CheckpointError, DeviceDisagrees) as error:
        if required:
            raise
        logger.warning("serving without a comparison model: %s", error)
        return None
    return model


def mismatch(model: ServedModel, served: ServedModel) -> str | None:
    """Why the two models can't share images and labels, or None."""
    if model.classes != served.classes:
        return f"the classes {_listed(model)} instead of {_listed(served)}"
    if model.input_size != served.input_size:
        size, other = model.input_size, served.input_size
        return f"images of {size} x {size} pixels instead of {other} x {other}"
    return None


def _listed(model: ServedModel) -> str:
    more = ", ..." if len(model.classes) > 10 else ""
    return f"{', '.join(model.classes[:10])}{more}"
