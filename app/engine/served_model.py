"""The served model, and loading one from a checkpoint."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from app.engine.cpu_limits import device_threads
from app.engine.gc_tuning import release_memory
from app.engine.runtime import Dtype, Runtime, runtimes_for
from app.engine.runtime_plan import RuntimePlan, probabilities_of
from app.metrics import Metrics
from robust.attacks import Model
from robust.checkpoint import load_checkpoint
from robust.classifier import Classifier
from robust.device import DeviceDisagrees, compare_with_cpu
from robust.evaluation.precision import (
    Precision,
    SearchPrecision,
    in_bf16,
    packed_float32,
    runs_in_torch,
    why_not_bf16,
)
from robust.images import to_float
from robust.inference import InferenceClassifier, at_least, for_inference
from robust.loading import ModelOptions
from robust.loading.given import GivenNetwork
from robust.prediction import predict
from robust.sidecar import Sidecar

logger = logging.getLogger(__name__)
FP32 = SearchPrecision(bf16=False, reason="as requested")


class HalfClassifier:
    """A classifier stored in float16, in half the memory, because its weights lose nothing.

    Only for storage: `to_float32` makes the exact classifier, which evaluations need.
    """

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        classifier.net.half()

    @staticmethod
    def is_exact(classifier: Classifier) -> bool:
        """Whether float16 holds all weights exactly; a network of other code never counts."""
        return not isinstance(classifier.net, GivenNetwork) and all(
            torch.equal(value.half().to(value.dtype), value)
            for value in classifier.net.state_dict().values()
            if value.is_floating_point()
        )

    def to_float32(self) -> Classifier:
        """A copy of the classifier in float32."""
        classifier = copy.deepcopy(self._classifier)
        classifier.net.float()
        return classifier


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedModel:
    """A classifier in eval mode on its device, with everything known about it.

    Work keeps the model that it was admitted with.
    """

    classifier: Classifier | HalfClassifier
    sidecar: Sidecar
    sha256: str  # of the weights file
    device: torch.device
    loaded: datetime
    name: str = "model.pt"  # of the weights file
    fast: Model | None = None  # the same function in fewer operations
    runtimes: tuple[Runtime, ...] = ()  # candidates for predictions, torch first
    plan: RuntimePlan | None = None  # the runtimes chosen from them
    bf16: Model | None = None  # `fast` in bfloat16, for searches, if that is chosen
    search: SearchPrecision = FP32  # of attacks and evaluations
    guessed: Mapping[str, str] = field(default_factory=dict)  # property to how it was guessed
    notes: tuple[str, ...] = ()  # on how the file was interpreted
    differentiable: bool = True  # False for an ONNX file or a remote service

    @property
    def precision(self) -> Dtype:
        """The precision of predictions."""
        return self.plan.precision if self.plan else "fp32"

    @property
    def precision_reason(self) -> str:
        """The reason for that precision; without bfloat16, the limit that ruled it out."""
        if self.plan:
            return self.plan.reason
        return "no runtime was chosen for predictions" if self.search.bf16 else self.search.reason

    @property
    def attack_precision(self) -> str:
        """The precision of attacks: possibly searched in bfloat16, always scored in float32."""
        return attack_precision(bf16=self.search.bf16)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return self.sidecar.classes

    @property
    def input_size(self) -> int:
        """Width and height of its input in pixels."""
        return self.sidecar.architecture.input_size

    @property
    def efficient_batch(self) -> int:
        """Batch size from which a larger one is no cheaper per image; 0 on a GPU.

        On a GPU, waiting for a larger batch gains nothing: passes and decoding use different cores.
        """
        if self.plan is None or self.device.type != "cpu":
            return 0
        return self.plan.choices[-1].images

    def exact(self) -> Classifier:
        """The classifier as trained, in eval mode; perhaps a copy that only the caller holds."""
        if isinstance(self.classifier, HalfClassifier):
            return self.classifier.to_float32().to(self.device)
        return self.classifier

    def logits(self, x: Tensor) -> Tensor:
        """Images float32 (N, 3, H, W) in [0, 1] on the device to logits float32 (N, K)."""
        logits: Tensor = (self.fast or self.exact())(x)
        return logits

    def classify(self, images: Tensor) -> Tensor:
        """Probabilities float32 (n, K) of images (n, 3, H, W), uint8 or float32 in [0, 1].

        They agree with those of `logits` within 1e-4, or 0.01 in bfloat16, and use the fastest
        runtime. Raises ValueError for NaN and infinities.
        """
        if self.plan is not None and self.device.type == "cpu":
            return probabilities_of(self.plan, images)
        model: Model = self.plan or self.logits
        if self.device.type == "cuda":
            images = images.pin_memory().to(self.device, non_blocking=True)
            model = at_least(bucket(len(images)), model)
        return predict(model, images if images.is_floating_point() else to_float(images))


def attack_precision(*, bf16: bool) -> str:
    """The precision of attacks and evaluations, as in the header X-Model-Precision."""
    return "fp32; search=bf16" if bf16 else "fp32"


def bucket(n: int) -> int:
    """The batch size that a pass of `n` images on a GPU is padded to.

    The next power of 2. The first pass of each batch size selects its kernels, which would delay a
    request.
    """
    return 1 << max(n - 1, 0).bit_length()


def reason_against_bf16(
    fast: InferenceClassifier, device: torch.device, precision: Precision
) -> str:
    """The reason not to make a bfloat16 copy; empty to make one.

    On a processor without bfloat16 instructions the copy is correct but slow, so there it is only
    made if `precision` is bf16.
    """
    if precision == "fp32":
        return "as requested"
    if precision == "bf16" and device.type in ("cpu", "cuda") and runs_in_torch(fast):
        return ""
    return why_not_bf16(fast, device)


def load_model(
    path: Path,
    device: torch.device,
    *,
    options: ModelOptions | None = None,
    fall_back: bool = False,
    threads: int = 0,
    metrics: Metrics | None = None,
    attacks_only: bool = False,
    precision: Precision = "fp32",
) -> ServedModel:
    """Load and validate a checkpoint, and build it for all runtimes.

    `options` describe a bare state dict. A bfloat16 copy is made here, and `warm` decides whether
    to use it. With `attacks_only` the model is built for torch only, which attacks use. If the
    device disagrees with the CPU, `fall_back` says to log a warning and use the CPU. Raises
    CheckpointError and, without `fall_back`, DeviceDisagrees.
    """
    # On the CPU first: the device still holds the current model, and gets only what will be used.
    checkpoint = load_checkpoint(path, device=torch.device("cpu"), options=options)
    classifier = checkpoint.classifier
    if not classifier.differentiable:  # it can't be moved to a device
        device = torch.device("cpu")
    fast = for_inference(classifier, device)
    try:
        compare_with_cpu(classifier, device, classifier.architecture.input_size, moved=fast)
    except DeviceDisagrees as error:
        if not fall_back:
            raise
        logger.warning("%s: using the CPU", error)
        device = torch.device("cpu")
        fast = for_inference(classifier, device)
    why_not = reason_against_bf16(fast, device, precision)
    bf16 = None if why_not else in_bf16(fast, device)
    fast_logits = packed_float32(fast, device)
    runtimes: tuple[Runtime, ...] = ()
    if not attacks_only:
        runtimes = runtimes_for(
            fast,
            fp32=fast_logits,
            bf16=bf16,
            threads=device_threads(threads),
            metrics=metrics or Metrics(),
        )
    half = HalfClassifier.is_exact(classifier)
    model = ServedModel(
        name=path.name,
        classifier=HalfClassifier(classifier) if half else classifier.to(device),
        fast=fast_logits,
        runtimes=runtimes,
        bf16=bf16,
        search=SearchPrecision(bf16=False, reason=why_not),
        sidecar=checkpoint.sidecar,
        sha256=checkpoint.sha256,
        device=device,
        loaded=datetime.now(UTC),
        guessed=checkpoint.guessed,
        notes=checkpoint.notes,
        differentiable=classifier.differentiable,
    )
    release_memory()
    return model
