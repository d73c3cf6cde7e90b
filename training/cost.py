"""Estimates of the steps, memory and time of a run before it starts."""

from __future__ import annotations

import logging
import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from robust.classifier import Architecture, Classifier
from training.display import time_left
from training.optimizer import autocast, uses_bf16
from training.recipe import Recipe

logger = logging.getLogger(__name__)

PROBE_PIXELS = 16 * 32 * 32  # pixels of the timed pass on a CPU
OVERHEAD = 1.2  # factor on the counted tensors, for allocators and kernels


@dataclass(frozen=True, kw_only=True)
class Cost:
    """An estimate; the run itself shows its remaining time after some steps."""

    steps: int
    data_bytes: int  # all images, which stay on the device
    model_bytes: int  # weights, gradients, optimizer state and averaged weights
    activation_bytes: int  # tensors that a batch saves for its backward pass
    seconds: float | None  # None: not timed

    @property
    def memory_bytes(self) -> int:
        """Bytes on the device at the peak, approximately."""
        return round(OVERHEAD * (self.data_bytes + self.model_bytes + self.activation_bytes))


def estimate(
    recipe: Recipe,
    *,
    images: int,
    num_classes: int,
    device: torch.device,
    ranks: int = 1,
    timed: bool = True,
) -> Cost:
    """The cost of a run on `images` training images; the time is that of one pass of some of them.

    `ranks` share every batch. The time excludes scoring and compiling. On a GPU the pass is one of
    a whole batch, as a few images do not fill it, if that fits in its memory.
    """
    architecture = Architecture(
        arch=recipe.arch,
        stem=recipe.stem,
        activation=recipe.activation,
        variant=recipe.variant,
        num_classes=num_classes,
        input_size=recipe.input_size,
    )
    bf16 = uses_bf16(recipe, device)
    with torch.device("meta"):
        meta = Classifier(architecture)
        shape = (2, 3, recipe.input_size, recipe.input_size)
        saved = _saved_bytes(meta, torch.empty(shape), bf16=bf16) / 2
    weights = sum(p.numel() * p.element_size() for p in meta.parameters())
    copies = 3 + (2 if recipe.optimizer == "adamw" else 1)  # weights, gradients and average
    batch = -(-recipe.batch_size // ranks)
    steps = images // recipe.batch_size
    passes = sum(phase.epochs * phase.passes for phase in recipe.phases)
    cost = Cost(
        steps=steps * recipe.epochs,
        data_bytes=images * 3 * recipe.input_size**2,
        model_bytes=weights * copies,
        activation_bytes=round(saved * batch),
        seconds=None,
    )
    if not timed:
        return cost
    probed = max(2, PROBE_PIXELS // recipe.input_size**2)
    if device.type == "cuda" and cost.memory_bytes <= (available_bytes(device) or 0):
        probed = batch
    seconds = _seconds_per_image(architecture, device, bf16=bf16, count=probed)
    return replace(cost, seconds=steps * batch * passes * seconds)


def describe_cost(
    recipe: Recipe,
    *,
    images: int,
    num_classes: int,
    device: torch.device,
    ranks: int = 1,
    timed: bool = True,
) -> str:
    """The cost of a run in one line; logs a warning if memory is too small.

    Without `timed` the number of epochs is not known yet, and the steps are those of one.
    """
    cost = estimate(
        recipe, images=images, num_classes=num_classes, device=device, ranks=ranks, timed=timed
    )
    needed, free = cost.memory_bytes / 1e9, available_bytes(device)
    if free is not None and cost.memory_bytes > free:
        logger.warning(
            "expected about %.1f GB of memory, found %.1f GB free: lower batch_size or input_size",
            needed,
            free / 1e9,
        )
    if device.type == "cpu":
        needed += resident_bytes() / 1e9
    memory = f"{recipe.batch_size} images, about {needed:.1f} GB of memory"
    if cost.seconds is None:
        return f"{images // recipe.batch_size:,} steps an epoch, of {memory}"
    return (
        f"{cost.steps:,} steps of {memory} and {time_left(cost.seconds)} "
        "(from one timed pass; without scoring)"
    )


def _saved_bytes(model: nn.Module, x: Tensor, *, bf16: bool) -> int:
    """Bytes that a training pass saves for its backward pass, without the weights."""
    weights = {id(p) for p in model.parameters()}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # keeps the tensors alive, so that no id is reused

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in weights:
            kept.append(tensor)
            sizes[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with autocast(bf16, torch.device("cpu")):
            model(x).sum()
    return sum(sizes.values())


def _seconds_per_image(
    architecture: Architecture, device: torch.device, *, bf16: bool, count: int
) -> float:
    """Seconds of one pass of one image: a third of a timed forward and backward pass of `count`."""
    with torch.random.fork_rng(devices=[]):
        model = Classifier(architecture)
    model = model.train().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    size = architecture.input_size
    x = torch.full((count, 3, size, size), 0.5, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    seconds = 0.0
    for _ in range(2):  # the first also prepares kernels and buffers
        started = time.perf_counter()
        with autocast(bf16, device):
            loss = model(x).sum()
        loss.backward()
        float(
            next(p.grad for p in model.parameters() if p.grad is not None).sum()
        )  # waits for the device
        seconds = time.perf_counter() - started
        if seconds > 1:  # long enough to neglect the preparation
            break
    return seconds / (3 * len(x))


def resident_bytes() -> int:
    """Memory in use by this process."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    except OSError:  # macOS: the peak so far, in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def available_bytes(device: torch.device) -> int | None:
    """Free memory of the device, or of the machine for the CPU; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * found[0] if found else None
