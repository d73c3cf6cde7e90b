"""Memory that is free, but not yet given back to the system."""

from __future__ import annotations

import ctypes
import gc

import torch


def give_back() -> None:
    """Return what was freed. Loading a model frees several times its size, in pieces that stay.

    What only cycles hold is collected first: an evaluation's classifier, when it is done.
    """
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library than glibc
        return


def settle() -> None:
    """Take all objects there are now for ones that stay, so that no collection looks at them.

    Torch alone brings some 300,000: a collection of all generations stands still for 90 ms, and
    every request with it. Objects that stop being referred to are freed as ever.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def resettle() -> None:
    """The same once more, where it was done: another model has come in the old one's place."""
    if gc.get_freeze_count():
        settle()
