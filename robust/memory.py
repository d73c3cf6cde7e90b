"""How to tell that memory ran out."""

from __future__ import annotations

import torch

# What torch says, as a plain RuntimeError, when the system refuses memory on the CPU, or a library
# on the device; and oneDNN and cuDNN, which give no reason but have hardly another.
_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "_ALLOC_FAILED",
    "could not create a primitive",
    "could not execute a primitive",
    "could not create a memory",
    "unable to find an engine to execute",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the memory of the device, or of the machine, did not suffice."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
