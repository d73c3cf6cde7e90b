"""What a measured number depends on: versions and the device, in words."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def project_version() -> str:
    """The installed version of this project, ``unknown`` where it runs without being installed."""
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
    """Whether the CPU is used though an NVIDIA driver is loaded, whose file is `control`."""
    return device.type == "cpu" and control.exists()


def device_in_words(device: torch.device) -> str:
    """The device as people name it: the GPU's own name, or ``cpu (2 threads)``."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"
