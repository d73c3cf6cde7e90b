"""What computes predictions: for each number of images the fastest runtime that agrees with torch.

Attacks need gradients and stay with torch, which is also what is left when a runtime is not
installed, fails or disagrees.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from app.metrics import Metrics
from app.pixels import as_float, softmax
from robust.inference import InferenceClassifier

logger = logging.getLogger(__name__)

TORCH = "torch"
ONNX_RUNTIME = "onnxruntime"
TOLERANCE = 1e-4  # most that a probability may differ, and a logit in parts of the largest
EXAMPLES = 8  # images that a runtime must agree on
SIZES = (1, 4, 16, 64)  # images at once that are measured
SECONDS = 0.6  # for all measurements together; what is too slow for it is never run at once
TURN = 0.02  # seconds for which one size is measured again and again
WORTH = 1.05  # how much faster for each image a larger size must be

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Runtime:
    """Something that maps images float32 (N, 3, S, S) in [0, 1] to logits float32 (N, K)."""

    name: str
    logits: Logits


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """The runtime for batches of up to so many images, and the time it took for that many."""

    images: int
    runtime: Runtime
    seconds: float

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.seconds


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Which runtime computes how many images; more than the last choice's go in several parts."""

    choices: tuple[Choice, ...]  # by number of images
    torch: Runtime
    metrics: Metrics

    def __call__(self, x: Tensor) -> Tensor:
        """The logits of any number of images, without a gradient."""
        if len(x) <= self.choices[-1].images:
            return self._part(x)
        return torch.cat([self._part(part) for part in torch.split(x, self.choices[-1].images)])

    def _part(self, x: Tensor) -> Tensor:
        runtime = next(item.runtime for item in self.choices if len(x) <= item.images)
        if runtime.name == TORCH:
            return runtime.logits(x)
        try:
            return runtime.logits(x)
        except Exception as error:
            _give_up(runtime.name, "failed", self.metrics, error)
            return self.torch.logits(x)


def runtimes_for(
    model: InferenceClassifier, *, threads: int, metrics: Metrics
) -> tuple[Runtime, ...]:
    """Torch, and what else is installed and takes the model. On a GPU that is torch alone."""
    runtimes = [Runtime(name=TORCH, logits=model)]
    if model.device.type == "cpu":
        try:
            runtimes.append(Runtime(name=ONNX_RUNTIME, logits=onnx_runtime(model, threads)))
        except ImportError:
            logger.info("predictions take torch: onnx or onnxruntime is not installed")
        except Exception as error:
            _give_up(ONNX_RUNTIME, "failed", metrics, error)
    return tuple(runtimes)


def onnx_runtime(model: InferenceClassifier, threads: int) -> Logits:
    """The model in ONNX Runtime on the CPU. Raises ImportError where it is not installed."""
    import onnxruntime

    from robust.graph import build_onnx

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # In small pieces: a thread that others keep from its processor leaves the rest to its fellow.
    options.add_session_config_entry("session.dynamic_block_base", "4")
    # Its threads wait busily within a pass; after it they would take the cores from torch's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        build_onnx(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def logits(x: Tensor) -> Tensor:
        (values,) = session.run(["logits"], {"images": x.numpy()})
        return torch.from_numpy(values)

    return logits


def probabilities_of(logits_of: Logits, images: Tensor) -> Tensor:
    """Probabilities float32 (n, K) of images on the CPU, uint8 or float32 in [0, 1].

    Raises ValueError for NaN and infinities, as `robust.prediction.predict` does.
    """
    x = torch.from_numpy(as_float(images.numpy()))
    with torch.inference_mode():
        logits = logits_of(x).numpy()
    if not np.isfinite(logits).all():
        raise ValueError("expected finite logits, got NaN or infinities from the model")
    return torch.from_numpy(softmax(logits))


def plan_for(
    runtimes: Sequence[Runtime],
    *,
    side: int,
    metrics: Metrics,
    pause: Callable[[], None] = lambda: None,
) -> Plan:
    """Compare `runtimes`, of which the first is torch, on images of `side` pixels.

    All take turns, and the fastest turn counts: who else uses the machine can only slow one down.
    `pause` is called before each turn.
    """
    torch_runtime, *others = runtimes
    x = examples(EXAMPLES, side)
    with torch.inference_mode():
        pause()
        expected = torch_runtime.logits(x)
        able = [torch_runtime]
        for runtime in others:
            pause()
            if _agrees(runtime, x, expected, metrics):
                able.append(runtime)
        choices = _choose(able, side, pause)
    return Plan(choices=choices, torch=torch_runtime, metrics=metrics)


def examples(n: int, side: int) -> Tensor:
    """Images float32 (n, 3, side, side) in [0, 1], from coarse patches to noise."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand(n, 3, 4, 4, generator=generator)
    noise = torch.rand(n, 3, side, side, generator=generator)
    share = torch.linspace(0, 1, n).view(n, 1, 1, 1)
    return (1 - share) * F.interpolate(patches, size=(side, side), mode="nearest") + share * noise


def gap(logits: Tensor, expected: Tensor) -> float:
    """How far two results are apart: in probabilities, or in parts of the largest logit."""
    if logits.shape != expected.shape or not bool(logits.isfinite().all()):
        return float("inf")
    scale = expected.abs().amax().clamp_min(1)
    apart = (logits - expected).abs().amax() / scale
    probabilities = (logits.softmax(dim=1) - expected.softmax(dim=1)).abs().amax()
    return float(torch.maximum(apart, probabilities))


def _agrees(runtime: Runtime, x: Tensor, expected: Tensor, metrics: Metrics) -> bool:
    try:
        # Alone as well: there are other kernels for a single image.
        off = max(gap(runtime.logits(x[:n]), expected[:n]) for n in (1, len(x)))
    except Exception as error:
        _give_up(runtime.name, "failed", metrics, error)
        return False
    if off > TOLERANCE:
        _give_up(runtime.name, "disagreed", metrics, ValueError(f"off by {off:g}"))
        return False
    return True


def _choose(
    runtimes: Sequence[Runtime], side: int, pause: Callable[[], None]
) -> tuple[Choice, ...]:
    choices: list[Choice] = []
    spent = 0.0
    for size in SIZES:
        if choices and spent + len(runtimes) * size / choices[-1].rate > SECONDS:
            break
        x = examples(size, side)
        best = dict.fromkeys(runtimes, float("inf"))
        turns = 0.0
        while turns <= TURN:
            for runtime in runtimes:
                pause()
                began = time.perf_counter()
                runtime.logits(x)
                took = time.perf_counter() - began
                best[runtime] = min(best[runtime], took)
                turns += took
        spent += turns
        fastest = min(best, key=lambda runtime: best[runtime])
        choices.append(Choice(images=size, runtime=fastest, seconds=best[fastest]))
    while len(choices) > 1 and choices[-1].rate < WORTH * choices[-2].rate:
        choices.pop()  # nothing gained by it, and the memory for a large batch saved
    return tuple(choices)


def _give_up(runtime: str, reason: str, metrics: Metrics, error: Exception) -> None:
    metrics.runtime_failures.labels(runtime, reason).inc()
    logger.error("%s %s, torch computes the predictions: %s", runtime, reason, error)
