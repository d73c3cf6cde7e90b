"""Memory that is free, but not yet given back to the system."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Return what was freed. Loading a model frees several times its size, in pieces that stay."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library than glibc
        return
