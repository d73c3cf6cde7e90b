"""Checks of an attack's arguments; each raises ValueError that says what was expected."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook

from robust.attacks.passes import ModelError, check_logits
from robust.choices import Norm
from robust.memory import is_out_of_memory


def check_callable(model: object) -> None:
    """A model must be a callable; the path of one is not loaded."""
    if callable(model) and not isinstance(model, type):
        return
    hint = "; load it with robust.load_model" if isinstance(model, str | Path) else ""
    if isinstance(model, type):
        hint = f" {model.__name__}; make a model of it first"
    raise ValueError(
        f"expected a module or callable from images to logits, got {_form(model)}{hint}"
    )


def try_model(model: Any, x: Tensor) -> Tensor:
    """The logits (N, K) of images float32 (N, C, H, W), without gradient.

    Raises ModelError if torch refuses the images, for an output other than logits, and for a
    batch norm in train mode, which a callable around a module can hide.
    """
    try:
        with torch.no_grad(), no_batch_norm_in_train_mode():
            return check_logits(model(x), x)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        kinds = (
            {value.dtype for value in model.parameters()} if isinstance(model, nn.Module) else set()
        )
        others = sorted(str(kind).removeprefix("torch.") for kind in kinds - {torch.float32})
        hint = f": its weights are {', '.join(others)}; call model.float()" if others else ""
        raise ModelError(
            f"expected a model that takes float32 images {tuple(x.shape)}, got an error from it "
            f"({str(error).splitlines()[0][:200]}){hint}"
        ) from error


@contextmanager
def no_batch_norm_in_train_mode() -> Iterator[None]:
    """Raises ModelError if a module called in the block is a batch norm in train mode."""
    hook = register_module_forward_pre_hook(_refuse_train_mode)
    try:
        yield
    finally:
        hook.remove()


def _refuse_train_mode(module: nn.Module, _: Any) -> None:
    if isinstance(module, _BatchNorm) and module.training:
        raise ModelError(
            "expected batch norm in eval mode, got one in train mode; call model.eval() first"
        )


def check_inputs(x: Tensor, y: Tensor, target: Tensor | None = None) -> None:
    """Images must be float (N, C, H, W) in [0, 1], labels and targets int64 (N,)."""
    if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"expected float images (N, C, H, W), got {_form(x)}")
    if not len(x):
        raise ValueError("expected at least 1 image, got none")
    for name, labels in (("labels", y), ("targets", target)):
        if labels is None:
            continue
        if (
            not isinstance(labels, Tensor)
            or labels.shape != (len(x),)
            or labels.dtype != torch.int64
        ):
            raise ValueError(f"expected {name} int64 ({len(x)},), got {_form(labels)}")
    check_range(x)
    if target is not None and bool((target == y).any()):
        raise ValueError("expected a target other than the label, got the label itself")


def check_range(images: Tensor, *, tolerance: float = 0.0) -> None:
    """Images must be in [0, 1], at most `tolerance` outside."""
    low, high = images.min().item(), images.max().item()
    if not (low >= -tolerance and high <= 1 + tolerance):  # also refuses NaN
        raise ValueError(f"expected images in [0, 1], got values from {low!r} to {high!r}")


def check_eps(eps: Tensor, x: Tensor, norm: Norm) -> None:
    """`eps` must be float (N,), one for each of the images `x`, at most 1 under `linf`."""
    if not isinstance(eps, Tensor) or eps.shape != (len(x),) or not eps.is_floating_point():
        raise ValueError(
            f"expected eps float ({len(x)},), one for each image (one for all is that of the "
            f"threat model), got {_form(eps)}"
        )
    most = 1.0 if norm == "linf" else torch.inf
    low, high = eps.min().item(), eps.max().item()
    if not (low >= 0 and high <= most):
        raise ValueError(f"expected eps from 0 to {most:g}, got {low:g} to {high:g}")


def check_seed(seed: int) -> None:
    """A seed must be a whole number that fits 64 bits."""
    as_whole("seed", seed, least=-(2**63))
    if not -(2**63) <= seed < 2**63 - 1:
        raise ValueError(f"expected a seed that fits 64 bits, got {seed}")


def check_counts(**counts: int) -> None:
    """All must be whole numbers of at least 1."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"expected {name} as a whole number of at least 1, got {count!r}")


def as_whole(name: str, value: Any, *, least: int = 1) -> int:
    """`value` as an int, also from NumPy or torch."""
    try:
        number = None if isinstance(value, bool) else index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        bound = f" of at least {least}" if least > -(2**63) else ""
        raise ValueError(f"expected {name} as a whole number{bound}, got {value!r}")
    return number


def check_classes(found: int, y: Tensor, target: Tensor | None = None) -> None:
    """A model of `found` classes must have all labels and targets."""
    for name, labels in (("labels", y), ("targets", target)):
        if labels is None:
            continue
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= found:
            raise ValueError(
                f"expected {name} from 0 to {found - 1}, for the {found} classes of the model, "
                f"got {low} to {high}"
            )


def _form(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"a {type(value).__name__}"
