"""Versions and the name of the device, for the record of a measurement."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def project_version() -> str:
    """The installed version of this project; ``unknown`` if it is not installed."""
    try:
        return metadata.version("robust")
    except metadata.PackageNotFoundError:
        return "unknown"


def versions() -> dict[str, str]:
    """Versions of this project, Python, torch and torchvision."""
    import torch

    return {
        "robust": project_version(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": metadata.version("torchvision"),  # importing it takes 160 MB
    }


def unused_gpu(device: torch.device, control: Path = Path("/dev/nvidiactl")) -> bool:
    """Whether the CPU is used although an NVIDIA driver is loaded, which has the file `control`."""
    return device.type == "cpu" and control.exists()


def device_in_words(device: torch.device, threads: int | None = None) -> str:
    """The name of the device: that of the GPU, or ``cpu (2 threads)``.

    Pass `threads` if another thread does the work, as torch has a thread count for each thread.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = threads or torch.get_num_threads()
    return f"{device.type} ({threads} thread{'s' * (threads != 1)})"
