"""The precision of an evaluation's passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from robust.agreement import compare, margin_error
from robust.attacks import Model
from robust.device import cpu_multiplies_bf16
from robust.inference import InferenceClassifier, in_bfloat16
from robust.memory import is_out_of_memory
from robust.packed import packed_if_faster

Precision = Literal["auto", "fp32", "bf16"]


# Images on which bfloat16 is compared with float32; few, as predictions wait for each pass.
PROBE = 4
# Images on which the error of the logits is measured again if the first ones refuse bfloat16. About
# 1 in 20 sets of 4 test images would refuse it for the shipped model; no set of 8 or more.
MORE_PROBES = 32
# Fewest passes of an evaluation for which packing weights and comparing copies, in the time of
# some 75 passes, is worth it on a CPU.
MIN_PASSES = 250
MIN_SPEEDUP = 1.2  # smallest speedup for a search in bfloat16
CLEAR_SPEEDUP = 1.5 * MIN_SPEEDUP  # at which a single measurement is enough
SIGN_AGREEMENT = 0.9  # smallest fraction of gradient signs that agree
# Largest error of bfloat16 logits relative to the median lead of the top class. Trained networks
# have 0.002 to 0.003; random ones 0.01 to 0.18, which can hide the differences attacks follow.
MARGIN_ERROR = 0.02
ONLY_TORCH = "only torch modules can run in bfloat16"
MIN_PARAMETERS = 10**6  # below, call overhead dominates and bfloat16 gains nothing
# Errors of a model without a gradient, or with an operation that has no kernel for bfloat16.
FAILURES = (RuntimeError, TypeError)


@dataclass(frozen=True, kw_only=True)
class SearchPrecision:
    """The precision of a search, and the reason for it."""

    bf16: bool
    reason: str

    def __str__(self) -> str:
        return "bf16 search, fp32 verified" if self.bf16 else "fp32"


def searches_in_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether the search uses bfloat16 if no measurement decides against it.

    Raises ValueError for another precision.
    """
    if precision not in get_args(Precision):
        raise ValueError(
            f"expected a precision out of {', '.join(get_args(Precision))}, got {precision!r}"
        )
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def choose_precision(
    precision: Precision,
    fast: Model,
    x: Tensor,
    y: Tensor,
    *,
    passes: int,
    bf16: Model | None = None,
) -> tuple[SearchPrecision, Model]:
    """The precision and the model for a search of `passes` passes.

    `auto` uses bfloat16 if it agrees with `fast` on the first images of `x` float32 (N, C, H, W)
    and, on a CPU, is faster; it stays in float32 if the comparison fails, as it does for a model
    without gradient or with an operation without bfloat16. An ONNX file or a remote service always
    stays in float32, as bfloat16 can't reach it. `bf16` is the bfloat16 copy of `fast`; by default
    it is created. In float32 the weights are packed if that is worth it. Raises
    ValueError for another precision.
    """
    chosen, copied = try_bf16(precision, fast, x, y, passes=passes, bf16=bf16)
    if copied is not None:
        return chosen, copied
    return chosen, packed_float32(fast, x.device) if passes >= MIN_PASSES else fast


def packed_float32(fast: Model, device: torch.device) -> Model:
    """`fast` with packed weights, if it is a large enough classifier on a CPU."""
    if device.type != "cpu" or not isinstance(fast, InferenceClassifier):
        return fast
    if sum(parameter.numel() for parameter in fast.parameters()) < MIN_PARAMETERS:
        return fast
    return packed_if_faster(fast, fast, torch.float32)


def try_bf16(
    precision: Precision,
    fast: Model,
    x: Tensor,
    y: Tensor,
    *,
    passes: int,
    bf16: Model | None,
) -> tuple[SearchPrecision, Model | None]:
    """The precision, and the model in bfloat16 if that is chosen, as `choose_precision` does."""
    device = x.device
    requested = searches_in_bf16(precision, device)
    if requested and not runs_in_torch(fast):
        return SearchPrecision(bf16=False, reason=ONLY_TORCH), None
    if precision != "auto":
        chosen = SearchPrecision(bf16=requested, reason="as requested")
        return chosen, (bf16 or in_bf16(fast, device)) if requested else None
    why_not = "" if bf16 is not None else why_not_bf16(fast, device)
    if not why_not and device.type == "cpu" and passes < MIN_PASSES:
        why_not = f"too few passes to try bfloat16: {passes:,}, below the limit of {MIN_PASSES:,}"
    if why_not:
        return SearchPrecision(bf16=False, reason=why_not), None
    try:
        candidate = bf16 or in_bf16(fast, device)
        found = _compare(fast, candidate, x[:MORE_PROBES], y[:MORE_PROBES])
    except FAILURES as error:
        return in_float32_after(error), None
    return found, candidate if found.bf16 else None


def in_float32_after(error: Exception) -> SearchPrecision:
    """Float32, as the test of bfloat16 failed. Raises `error` itself if memory ran out."""
    if is_out_of_memory(error):
        raise error
    reason = f"the test of bfloat16 failed: {str(error).partition(chr(10))[0]}"
    return SearchPrecision(bf16=False, reason=reason)


def runs_in_torch(model: Model) -> bool:
    """Whether torch computes the model; False for an ONNX file or a remote service."""
    return bool(getattr(getattr(model, "classifier", model), "differentiable", True))


def why_not_bf16(model: Model, device: torch.device) -> str:
    """The reason not to try bfloat16 for this model on this device; empty if there is none."""
    if not runs_in_torch(model):
        return ONLY_TORCH
    if device.type == "cuda":
        return ""
    if device.type != "cpu":
        return f"bfloat16 is not tried on {device.type}"
    if not cpu_multiplies_bf16():
        return "this processor has no instructions for bfloat16"
    if not isinstance(model, nn.Module):
        return "bfloat16 is tried on torch modules only"
    size = sum(parameter.numel() for parameter in model.parameters())
    if not size:  # it wraps a service, a runtime session or a closure
        return "bfloat16 is tried on torch modules only"
    if size < MIN_PARAMETERS:
        return (
            "the model is too small to gain from bfloat16: "
            f"{size:,} parameters, below the limit of {MIN_PARAMETERS:,}"
        )
    return ""


def _compare(fast: Model, candidate: Model, x: Tensor, y: Tensor) -> SearchPrecision:
    """The choice after comparing gradients of both models; the reason names a missed limit."""
    found = compare(candidate, fast, x[:PROBE], y[:PROBE], clear_speedup=CLEAR_SPEEDUP)
    off = found.margin_error
    if not off <= MARGIN_ERROR and len(x) > PROBE:  # also for NaN
        with torch.no_grad():
            off = margin_error(candidate(x).float(), fast(x).float())
    if not off <= MARGIN_ERROR:
        error = f"bfloat16 is off by {off:.1%} of the likeliest class's median lead"
        return SearchPrecision(bf16=False, reason=f"{error}, above the limit of {MARGIN_ERROR:.0%}")
    agrees = f"{found.sign_agreement:.1%} of the gradient's signs agree"
    if found.sign_agreement < SIGN_AGREEMENT:
        reason = f"{agrees}, below the limit of {SIGN_AGREEMENT:.0%}"
        return SearchPrecision(bf16=False, reason=reason)
    if x.device.type != "cpu":
        return SearchPrecision(bf16=True, reason=agrees)
    faster = f"bfloat16 is {found.speedup:.1f} times as fast as float32 on {len(x[:PROBE])} images"
    if found.speedup < MIN_SPEEDUP:
        return SearchPrecision(bf16=False, reason=f"{faster}, below the limit of {MIN_SPEEDUP}")
    return SearchPrecision(bf16=True, reason=f"{faster}, and {agrees}")


def in_bf16(fast: Model, device: torch.device) -> Model:
    """`fast` with products in bfloat16: a cast copy of a classifier, autocast for any other.

    On a CPU the copy's weights are prepacked if that is faster.
    """
    copied = in_bfloat16(fast) if isinstance(fast, InferenceClassifier) else None
    if copied is not None:
        assert isinstance(fast, InferenceClassifier)
        return packed_if_faster(fast, copied) if device.type == "cpu" else copied

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return fast(x)

    return forward


@contextmanager
def full_float32() -> Iterator[None]:
    """Disable TF32 and bfloat16 products for float32; restores the previous settings.

    torch has two APIs for these settings and raises if they contradict each other, so both are set
    and both restored. If the caller's already contradict, the old API's are left alone.
    """
    backends: Any = torch.backends
    places = (
        *(backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn),
        *(backends.mkldnn.matmul, backends.mkldnn.conv),
    )
    saved = [place.fp32_precision for place in places]
    old: tuple[str, bool] | None = None
    with suppress(RuntimeError):
        old = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
    try:
        if old is not None:
            torch.set_float32_matmul_precision("highest")
            backends.cudnn.allow_tf32 = False
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        if old is not None:
            torch.set_float32_matmul_precision(old[0])
            backends.cudnn.allow_tf32 = old[1]
        for place, value in zip(places, saved, strict=True):
            place.fp32_precision = value


@contextmanager
def repeatable() -> Iterator[None]:
    """Use only deterministic cuDNN algorithms; restores the previous settings."""
    cudnn: Any = torch.backends.cudnn
    saved = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = saved
