"""Chooses the runtime for predictions: for each batch size the fastest that agrees with torch.

Torch in float32 is the reference, and the fallback if a runtime fails or disagrees. All
predictions of a model use one precision: bfloat16 if it is requested or faster, and if it agrees.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from app.engine.numpy_ops import as_float, softmax
from app.engine.runtime import TORCH, Dtype, Logits, Runtime, give_up
from app.metrics import Metrics
from robust.evaluation.precision import MIN_SPEEDUP, Precision

TOLERANCE = 1e-4  # largest difference of a probability, and of a logit relative to the largest
BF16_TOLERANCE = 0.01  # largest difference of a probability in bfloat16; labels must be equal
EXAMPLES = 8  # images that a runtime must agree on
SIZES = (1, 4, 16, 64)  # batch sizes to measure
SECONDS = 0.3  # of measurements per runtime, after which no larger batch size is measured
SECONDS_PER_SIZE = 0.02  # of repeated measurements of one batch size
MIN_BATCH_GAIN = 1.05  # smallest speedup per image of a larger batch size
MAX_SLOWDOWN = 1.05  # of bfloat16 relative to float32, at any batch size
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, eq=False)
class RuntimeChoice:
    """The runtime for batches of up to `images` images, and its time for that many."""

    images: int
    runtime: Runtime
    seconds: float

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.seconds


@dataclass(frozen=True, kw_only=True, eq=False)
class RuntimePlan:
    """The runtime for each batch size; batches above the largest size are split."""

    choices: tuple[RuntimeChoice, ...]  # by batch size, all of one precision
    torch: Runtime  # in float32, the fallback
    metrics: Metrics
    reason: str = "as requested"  # for the precision

    @property
    def precision(self) -> Dtype:
        """The precision of predictions."""
        return self.choices[0].runtime.precision

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (n, K) of any number of images, without gradients."""
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
            give_up(runtime.name, "failed", self.metrics, error)
            return self.torch.logits(x)


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


def make_plan(
    runtimes: Sequence[Runtime],
    *,
    side: int,
    metrics: Metrics,
    precision: Precision = "auto",
    why_not_bf16: str = "no runtime in bfloat16 was built",
    device: torch.device = CPU,
    pause: Callable[[], None] = lambda: None,
) -> RuntimePlan:
    """The fastest of `runtimes` for each batch size, measured on images of `side` pixels.

    The first of `runtimes` is torch in float32. They are measured in turns, and the fastest time
    counts, because other load can only slow a runtime down. With precision auto, bfloat16 is used
    if it agrees and is faster; with bf16, if it agrees. The plan's `reason` names the limit that
    ruled bfloat16 out, or is `why_not_bf16` if no runtime uses it. `pause` is called before each
    turn.
    """
    torch_runtime, *others = runtimes
    x = examples(EXAMPLES, side).to(device)
    able, refused = [torch_runtime], why_not_bf16
    with torch.inference_mode():
        pause()
        expected = torch_runtime.logits(x).cpu()
        for runtime in others:
            pause()
            problem = _problem(runtime, x, expected, metrics)
            if not problem:
                able.append(runtime)
            elif runtime.precision == "bf16":
                refused = f"{runtime.name} in bfloat16: {problem}"
        able_bf16 = [runtime for runtime in able if runtime.precision == "bf16"]
        if precision == "bf16" and able_bf16:
            measured = _measure(able_bf16, side, device, pause)
            reason = "as requested"
        else:
            measured = _measure(able, side, device, pause)
            reason = "as requested" if precision == "fp32" else refused
    if precision == "auto" and able_bf16:
        use_bf16, reason = _is_faster(measured)
    else:
        use_bf16 = precision == "bf16" and bool(able_bf16)
    choices = _choices(measured, "bf16" if use_bf16 else "fp32")
    return RuntimePlan(choices=choices, torch=torch_runtime, metrics=metrics, reason=reason)


def examples(n: int, side: int) -> Tensor:
    """Images float32 (n, 3, side, side) in [0, 1], ranging from coarse patches to noise."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand(n, 3, 4, 4, generator=generator)
    noise = torch.rand(n, 3, side, side, generator=generator)
    share = torch.linspace(0, 1, n).view(n, 1, 1, 1)
    return (1 - share) * F.interpolate(patches, size=(side, side), mode="nearest") + share * noise


def gap(logits: Tensor, expected: Tensor) -> float:
    """The larger of two differences: of probabilities, and of logits relative to the largest."""
    if logits.shape != expected.shape or not bool(logits.isfinite().all()):
        return float("inf")
    scale = expected.abs().amax().clamp_min(1)
    apart = (logits - expected).abs().amax() / scale
    probabilities = (logits.softmax(dim=1) - expected.softmax(dim=1)).abs().amax()
    return float(torch.maximum(apart, probabilities))


def _problem(runtime: Runtime, x: Tensor, expected: Tensor, metrics: Metrics) -> str:
    """The reason that rules the runtime out; empty if there is none."""
    try:
        # A single image too, which uses other kernels.
        found = [(runtime.logits(x[:n]).cpu(), expected[:n]) for n in (1, len(x))]
    except Exception as error:
        give_up(runtime.name, "failed", metrics, error)
        return f"failed with {error}"
    if runtime.precision == "bf16":
        problems = (_bf16_problem(part, same) for part, same in found)
        return next(filter(None, problems), "")
    off = max(gap(part, same) for part, same in found)
    if off <= TOLERANCE:
        return ""
    give_up(runtime.name, "disagreed", metrics, ValueError(f"off by {off:g}"))
    return f"off by {off:g}, above the limit of {TOLERANCE:g}"


def _bf16_problem(logits: Tensor, expected: Tensor) -> str:
    if logits.shape != expected.shape:
        return f"expected logits of shape {tuple(expected.shape)}, got {tuple(logits.shape)}"
    if not bool(logits.isfinite().all()):
        return "the logits are not finite"
    off = float((logits.softmax(dim=1) - expected.softmax(dim=1)).abs().amax())
    if off > BF16_TOLERANCE:
        return f"probabilities are off by {off:.3f}, above the limit of {BF16_TOLERANCE}"
    changed = int((logits.argmax(dim=1) != expected.argmax(dim=1)).sum())
    return f"{changed} of {len(expected)} labels differ, above the limit of 0" if changed else ""


Seconds = dict[int, dict[Runtime, float]]  # of the fastest pass, by batch size and runtime


def _measure(
    runtimes: Sequence[Runtime], side: int, device: torch.device, pause: Callable[[], None]
) -> Seconds:
    measured: Seconds = {}
    spent, rate, limit = 0.0, 0.0, SECONDS * max(2, len(runtimes))
    for size in SIZES:
        if measured and spent + len(runtimes) * size / rate > limit:
            break
        x = examples(size, side).to(device)
        best = measured[size] = dict.fromkeys(runtimes, float("inf"))
        total = 0.0
        while total <= SECONDS_PER_SIZE:
            for runtime in runtimes:
                pause()
                began = time.perf_counter()
                runtime.logits(x).cpu()  # waits for a GPU to finish
                took = time.perf_counter() - began
                best[runtime] = min(best[runtime], took)
                total += took
        spent += total
        rate = size / min(best.values())
    return measured


def _fastest(measured: Seconds, precision: Dtype) -> list[RuntimeChoice]:
    """The fastest runtime of that precision for each measured batch size."""
    choices = []
    for size, best in measured.items():
        able = [runtime for runtime in best if runtime.precision == precision]
        fastest = min(able, key=lambda runtime: best[runtime])
        choices.append(RuntimeChoice(images=size, runtime=fastest, seconds=best[fastest]))
    return choices


def _choices(measured: Seconds, precision: Dtype) -> tuple[RuntimeChoice, ...]:
    choices = _fastest(measured, precision)
    while len(choices) > 1 and choices[-1].rate < MIN_BATCH_GAIN * choices[-2].rate:
        choices.pop()  # a larger batch gains nothing, and needs more memory
    return tuple(choices)


def _is_faster(measured: Seconds) -> tuple[bool, str]:
    """Whether bfloat16 is enough faster to be worth its rounding, and the reason."""
    bf16, fp32 = (_fastest(measured, precision) for precision in ("bf16", "fp32"))
    gain = max(choice.rate for choice in bf16) / max(choice.rate for choice in fp32)
    reason = f"bfloat16 classifies {gain:.1f} times as many images per second as float32"
    if gain < MIN_SPEEDUP:
        return False, f"{reason}, below the limit of {MIN_SPEEDUP}"
    for one, other in zip(bf16, fp32, strict=True):
        longer = one.seconds / other.seconds
        if longer > MAX_SLOWDOWN:
            reason = f"{longer:.2f} times as long as float32, above the limit of {MAX_SLOWDOWN}"
            return False, f"for {one.images} images bfloat16 takes {reason}"
    return True, reason
