"""How exactly the passes of an evaluation are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from robust.attacks import Model

Precision = Literal["auto", "fp32", "bf16"]


def searches_in_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether the search is to run in bfloat16. Raises ValueError for another precision."""
    if precision not in get_args(Precision):
        raise ValueError(
            f"expected a precision out of {', '.join(get_args(Precision))}, got {precision!r}"
        )
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def in_bf16(model: Model, device: torch.device) -> Model:
    """`model` under autocast."""

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return model(x)

    return forward


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 and no bfloat16 products: float32 means float32; what was set is put back.

    torch keeps these settings twice, and fails where the two contradict each other; so both are
    set, and both put back. Where the caller's contradict already, the old ones are left alone.
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
    """No cuDNN algorithm that adds in another order each time; what was set is put back."""
    cudnn: Any = torch.backends.cudnn
    saved = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = saved
