"""Memory that is free, but not yet given back to the system."""

from __future__ import annotations

import ctypes
import gc


def give_back() -> None:
    """Return what was freed. Loading a model frees several times its size, in pieces that stay.

    What only cycles hold is collected first: an evaluation's classifier, when it is done.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library than glibc
        return
