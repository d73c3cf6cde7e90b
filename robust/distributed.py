"""The processes of a job that torchrun started; without torchrun there is only one.

torchrun sets RANK, WORLD_SIZE and LOCAL_RANK (the rank within a machine) in the environment.
Python objects are exchanged through the CPU (gloo), gradients on CUDA through NCCL.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import torch

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

# Timeout for the other ranks. A rank that died is noticed sooner: its connections break, and
# torchrun ends the others.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True)
class World:
    """One of `size` processes, which all call the same methods in the same order."""

    rank: int = 0
    size: int = 1

    @property
    def is_rank0(self) -> bool:
        """Whether this process prints and writes files for all."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in order of rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_rank0(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0; every rank returns its result, or raises its exception.

        For an exception that can't be pickled, the other ranks raise a RuntimeError with its text.
        """
        if self.size == 1:
            return make()
        import torch.distributed as dist

        outcome: list[Any] = [None, None]  # result, exception
        failure: Exception | None = None
        if self.is_rank0:
            try:
                outcome[0] = make()
            except Exception as error:
                failure = error
                outcome[1] = _picklable(error)
        dist.broadcast_object_list(outcome, src=0)
        value, received = outcome
        if received is not None:
            raise failure or received
        return value  # type: ignore[no-any-return]

    def in_words(self, device: str) -> str:
        """The devices of all ranks, where each has a `device`: ``2 times NVIDIA H200``."""
        return device if self.size == 1 else f"{self.size} times {device}"

    def per_rank_path(self, path: Path) -> Path:
        """`path` for this rank alone: with several ranks, named like ``NAME.1-of-2``."""
        if self.size == 1:
            return path
        return path.with_name(f"{path.name}.{self.rank + 1}-of-{self.size}")


SINGLE = World()


def _picklable(error: Exception) -> Exception:
    """The same error if it can be pickled and read again; else a RuntimeError with its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of any type: `error` may be of any library
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def init_distributed(
    device: torch.device, *, timeout: timedelta = TIMEOUT
) -> Iterator[tuple[World, torch.device]]:
    """Join the processes that torchrun started; yields this process's World and device.

    On CUDA each process uses the GPU of its LOCAL_RANK, unless `device` names one. Raises
    ValueError if a machine has fewer GPUs than processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield SINGLE, device
        return
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    # Its functions capture the current default group as a default argument. If torch imported it
    # later, it would keep the group and its threads alive, and those may abort Python's exit.
    with suppress(ImportError):
        import_module("torch.distributed.nn")
    device = _own_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, _ = next(rendezvous("env://"))
    store = _fresh_store(store, rank, size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield World(rank=rank, size=size), device
    finally:
        dist.destroy_process_group()


def _fresh_store(store: Store, rank: int, size: int) -> Store:
    """`store` with a prefix that is new each time torchrun starts the processes.

    Processes that torchrun restarts get the store of the killed ones, with their stale addresses
    in it (github.com/pytorch/pytorch/issues/135712). So each rank announces itself under a unique
    id, and rank 0 sends every id the common prefix until that rank has confirmed it.
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
            elif store.check([f"here/{other}"]):  # from this start or an earlier one
                store.set(f"for/{store.get(f'here/{other}').decode()}", own)
        time.sleep(0.02)
    return PrefixStore(own, store)


def _own_device(device: torch.device) -> torch.device:
    if device.type != "cuda" or device.index is not None:
        return device
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            "expected as many GPUs as processes on a machine, got "
            f"{count} for process {local_rank + 1}"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
