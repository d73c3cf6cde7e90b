"""The model that is served, and how a checkpoint becomes one."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from robust.checkpoint import load_checkpoint
from robust.classifier import Classifier
from robust.inference import InferenceClassifier, for_inference
from robust.sidecar import Sidecar


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedModel:
    """A classifier in eval mode on its device. Work keeps the one it was admitted with."""

    classifier: Classifier
    sidecar: Sidecar
    sha256: str  # of the weights file
    device: torch.device
    loaded: datetime
    name: str = "model.pt"  # of the weights file
    fast: InferenceClassifier | None = None  # the same function in fewer operations

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return self.sidecar.classes

    @property
    def input_size(self) -> int:
        """Pixels a side of the images it takes."""
        return self.sidecar.architecture.input_size

    def logits(self, x: Tensor) -> Tensor:
        """Images float32 (N, 3, H, W) in [0, 1] on the device to logits float32 (N, K)."""
        logits: Tensor = (self.fast or self.classifier)(x)
        return logits


def load_model(path: Path, device: torch.device) -> ServedModel:
    """Read and validate a checkpoint. Raises CheckpointError."""
    checkpoint = load_checkpoint(path, device=device)
    return ServedModel(
        name=path.name,
        classifier=checkpoint.classifier,
        fast=for_inference(checkpoint.classifier, device),
        sidecar=checkpoint.sidecar,
        sha256=checkpoint.sha256,
        device=device,
        loaded=datetime.now(UTC),
    )
