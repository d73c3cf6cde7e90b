"""The model that is served, and how a checkpoint becomes one."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from app.memory import give_back
from app.metrics import Metrics
from app.processors import device_threads
from app.runtime import Plan, Runtime, probabilities_of, runtimes_for
from robust.attacks import Model
from robust.checkpoint import load_checkpoint
from robust.classifier import Classifier
from robust.images import to_float
from robust.inference import InferenceClassifier, at_least, for_inference
from robust.prediction import predict
from robust.sidecar import Sidecar


class HalfClassifier:
    """A classifier whose weights float16 holds without loss, in half the memory.

    It computes nothing: only evaluations need the classifier itself, and they make it `whole`.
    """

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        classifier.net.half()

    @staticmethod
    def holds(classifier: Classifier) -> bool:
        """Whether no weight would be another one."""
        return all(
            torch.equal(value.half().to(value.dtype), value)
            for value in classifier.net.state_dict().values()
            if value.is_floating_point()
        )

    def whole(self) -> Classifier:
        """The classifier in float32."""
        classifier = copy.deepcopy(self._classifier)
        classifier.net.float()
        return classifier


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedModel:
    """A classifier in eval mode on its device. Work keeps the one it was admitted with."""

    classifier: Classifier | HalfClassifier
    sidecar: Sidecar
    sha256: str  # of the weights file
    device: torch.device
    loaded: datetime
    name: str = "model.pt"  # of the weights file
    fast: InferenceClassifier | None = None  # the same function in fewer operations
    runtimes: tuple[Runtime, ...] = ()  # that may compute predictions, torch first
    plan: Plan | None = None  # which of them do

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return self.sidecar.classes

    @property
    def input_size(self) -> int:
        """Pixels a side of the images it takes."""
        return self.sidecar.architecture.input_size

    @property
    def enough(self) -> int:
        """Images from which on a larger pass is no cheaper for each; 0 on a GPU.

        There passes and the decoding of images do not need the same processors.
        """
        if self.plan is None or self.device.type != "cpu":
            return 0
        return self.plan.choices[-1].images

    def exact(self) -> Classifier:
        """The classifier as it was trained, in eval mode; held by nobody but the caller."""
        if isinstance(self.classifier, HalfClassifier):
            return self.classifier.whole().to(self.device)
        return self.classifier

    def logits(self, x: Tensor) -> Tensor:
        """Images float32 (N, 3, H, W) in [0, 1] on the device to logits float32 (N, K)."""
        logits: Tensor = (self.fast or self.exact())(x)
        return logits

    def classify(self, images: Tensor) -> Tensor:
        """Probabilities float32 (n, K) of images (n, 3, H, W), uint8 or float32 in [0, 1].

        They agree within 1e-4 with those of the `logits`, and come as fast as it gets. Raises
        ValueError for NaN and infinities.
        """
        if self.plan is not None and self.device.type == "cpu":
            return probabilities_of(self.plan, images)
        model: Model = self.plan or self.logits
        if self.device.type == "cuda":
            images = images.pin_memory().to(self.device, non_blocking=True)
            model = at_least(bucket(len(images)), model)
        return predict(model, images if images.is_floating_point() else to_float(images))


def bucket(n: int) -> int:
    """How many images a pass of `n` on a GPU is filled up to: each size has kernels of its own.

    They are picked at the first pass of that size, which would make a request wait.
    """
    return 1 << max(n - 1, 0).bit_length()


def load_model(
    path: Path, device: torch.device, *, threads: int = 0, metrics: Metrics | None = None
) -> ServedModel:
    """Read and validate a checkpoint, and build it in all its runtimes. Raises CheckpointError."""
    # On the CPU first: beside the model in service the device has to hold what serves, no more.
    checkpoint = load_checkpoint(path, device=torch.device("cpu"))
    classifier = checkpoint.classifier
    fast = for_inference(classifier, device)
    runtimes = runtimes_for(fast, threads=device_threads(threads), metrics=metrics or Metrics())
    half = HalfClassifier.holds(classifier)
    model = ServedModel(
        name=path.name,
        classifier=HalfClassifier(classifier) if half else classifier.to(device),
        fast=fast,
        runtimes=runtimes,
        sidecar=checkpoint.sidecar,
        sha256=checkpoint.sha256,
        device=device,
        loaded=datetime.now(UTC),
    )
    give_back()
    return model
