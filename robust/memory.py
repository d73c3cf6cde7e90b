"""Recognizes errors that mean out of memory."""

from __future__ import annotations

import torch

# Messages of the plain RuntimeErrors that torch raises when the CPU or a device library is out of
# memory. oneDNN and cuDNN give no reason, but it is nearly always this one.
_OUT_OF_MEMORY = (
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
    """Whether `error` means that the device or the machine ran out of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
