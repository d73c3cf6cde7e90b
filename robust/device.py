"""Selects the device, and checks that it agrees with the CPU."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

KINDS = ("cpu", "cuda", "mps", "xpu")  # ROCm devices are called cuda too
PROBED = 4  # images that are compared
TOLERANCE = 1e-2  # largest relative error; that of TF32 is a tenth of it


class DeviceDisagrees(ValueError):
    """A device computes other logits or gradients than the CPU, or none."""


def resolve_device(name: str | torch.device) -> torch.device:
    """The device of that name; `auto` is the accelerator that torch finds, else the CPU.

    Raises ValueError for a missing device.
    """
    if isinstance(name, torch.device) and name.type not in KINDS:
        return name  # of a backend that this project doesn't know
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.device(found.type if found is not None and found.type in KINDS else "cpu")
    try:
        device = torch.device(name) if isinstance(name, str | torch.device) else None
    except RuntimeError:
        device = None
    if device is None or device.type not in KINDS:
        raise ValueError(f"expected a device such as auto, {', '.join(KINDS)}, got {name!r}")
    if device.type == "cpu":
        return device
    shown, module = str(name), torch.get_device_module(device.type)
    kind = device.type.upper()
    if not module.is_available():
        raise ValueError(f"expected a {kind} device for {shown!r}, found none; use auto or cpu")
    count = module.device_count()
    if (device.index or 0) >= count:
        raise ValueError(f"expected a {kind} device from 0 to {count - 1}, got {shown!r}")
    return device


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has instructions for bfloat16 products (AVX-512 BF16 or AMX)."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16", False) or found.get("amx_bf16", False))


def compare_with_cpu(
    classifier: nn.Module, device: torch.device, size: int, *, moved: nn.Module | None = None
) -> None:
    """Raise DeviceDisagrees unless logits and gradients on `device` match the CPU's, up to TF32.

    `classifier` is on the CPU and takes images (N, 3, size, size). It is moved to the device,
    unless `moved` is its copy there.
    """
    if device.type == "cpu":
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(PROBED, 3, size, size, generator=generator)
    expected = _logits_and_gradient(classifier, x)
    try:
        found = _logits_and_gradient(moved or classifier.to(device), x.to(device))
    except (RuntimeError, NotImplementedError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        why = str(error).splitlines()[0][:200]
        raise DeviceDisagrees(f"{device} can't compute this model ({why})") from None
    for name, one, other in zip(("logits", "gradients"), found, expected, strict=True):
        # A ReLU within rounding error of 0 can change the gradient of one image, rarely of most.
        length, gap = (values.flatten(1).norm(dim=1) for values in (other, one.cpu() - other))
        errors = gap / length.where(gap != 0, 1)  # equal gradients of 0 agree
        typical = float(errors.nan_to_num(nan=torch.inf, posinf=torch.inf).median())
        if typical > TOLERANCE:
            raise DeviceDisagrees(
                f"{device} disagrees with the CPU: {name} are off by {typical:.1%} of their size"
            )


def _logits_and_gradient(classifier: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.requires_grad_()
    logits = classifier(x)
    if not logits.requires_grad:
        return logits.detach(), torch.ones(len(x), 1)
    (gradient,) = torch.autograd.grad(logits.logsumexp(dim=1).sum(), x, allow_unused=True)
    if gradient is None:  # the model detaches its images
        gradient = torch.zeros_like(x)
    return logits.detach(), gradient
