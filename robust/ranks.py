"""The processes that work on one thing together, started by torchrun; alone there is one.

torchrun tells each its place through the environment: RANK of WORLD_SIZE, and LOCAL_RANK on its
machine. What is said here between them goes through the CPU (gloo); gradients on CUDA go through
NCCL.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import torch

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

# How long to wait for the others. Those that died are noticed sooner: their connections break, and
# torchrun ends the rest.
PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """One process among `size`, each of which calls the same methods in the same order."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank, or the exception it raises there, on all."""
        if self.size == 1:
            return make()
        import torch.distributed as dist

        parcel: list[Any] = [None, None]
        if self.is_first:
            try:
                parcel[0] = make()
            except Exception as error:
                parcel[1] = error
        dist.broadcast_object_list(parcel, src=0)
        value, failure = parcel
        if failure is not None:
            raise failure
        return value  # type: ignore[no-any-return]

    def in_words(self, device: str) -> str:
        """What all work on, where `device` is what one does: ``2 times NVIDIA H200``."""
        return device if self.size == 1 else f"{self.size} times {device}"

    def own_file(self, path: Path) -> Path:
        """`path`, with this rank in its name where there are several: ``NAME.1-of-2``."""
        if self.size == 1:
            return path
        return path.with_name(f"{path.name}.{self.rank + 1}-of-{self.size}")


ALONE = Ranks()


@contextmanager
def joined(
    device: torch.device, *, patience: timedelta = PATIENCE
) -> Iterator[tuple[Ranks, torch.device]]:
    """This process among those that torchrun started, and the device it is to use.

    On CUDA each takes the GPU of its place on the machine, unless `device` names one. Raises
    ValueError where a machine has fewer GPUs than processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE, device
        return
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    device = _own_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, _ = next(rendezvous("env://"))
    store = _fresh(store, rank, size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    try:
        yield Ranks(rank=rank, size=size), device
    finally:
        dist.destroy_process_group()


def _fresh(store: Store, rank: int, size: int) -> Store:
    """`store` under a name that is new to this start of all ranks.

    torchrun gives those that it starts again the store of those that were killed, with the
    addresses of these in it (github.com/pytorch/pytorch/issues/135712). So each rank calls itself
    by a name of its own, and the first tells each of those the name for all, until it is taken up.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    own = uuid4().hex
    store.set(f"here/{rank}", own)
    if rank > 0:
        name = store.get(f"for/{own}").decode()
        store.set(f"taken/{name}/{rank}", "")
        return PrefixStore(name, store)
    others = set(range(1, size))
    while others:
        for other in list(others):
            if store.check([f"taken/{own}/{other}"]):
                others.remove(other)
            elif store.check([f"here/{other}"]):  # of this start, or still of an earlier one
                store.set(f"for/{store.get(f'here/{other}').decode()}", own)
        time.sleep(0.02)
    return PrefixStore(own, store)


def _own_device(device: torch.device) -> torch.device:
    if device.type != "cuda" or device.index is not None:
        return device
    place, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= count:
        raise ValueError(
            f"expected as many GPUs as processes on a machine, got {count} for process {place + 1}"
        )
    torch.cuda.set_device(place)
    return torch.device("cuda", place)
