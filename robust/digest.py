"""SHA-256 of tensors and modules."""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor, nn

_ADDRESS = re.compile(r"\b0x[0-9a-f]+")  # of an object, which differs between processes


def module_digest(module: nn.Module) -> str:
    """SHA-256 of a module's state dict, buffers and layers with their settings."""
    digest = hashlib.sha256(_text(module))
    # Buffers that are not part of the state dict, such as a mean, change the logits too.
    for name, value in {**module.state_dict(), **dict(module.named_buffers())}.items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(tensor_bytes(value))
        else:  # of a module with `get_extra_state`
            digest.update(_text((name, value)))
    return digest.hexdigest()


def tensor_bytes(values: Tensor) -> bytes:
    """The bytes of a tensor's values in order."""
    return values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _text(value: object) -> bytes:
    return _ADDRESS.sub("", repr(value)).encode()
