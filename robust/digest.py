"""SHA-256 of tensors and modules."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import torch
from torch import Tensor, nn

_ADDRESS = re.compile(r"\b0x[0-9a-f]+")  # of an object, which differs between processes
_OWN = frozenset(vars(nn.Module()))  # what torch itself keeps in each module, such as hooks


def module_digest(module: nn.Module) -> str:
    """SHA-256 of a module's state dict, buffers, plain attributes and layers with their settings.

    Attributes count if they are tensors, arrays, numbers, strings, modules, None, or tuples, lists
    or dicts of these.
    """
    digest = hashlib.sha256()
    _add_module(digest, module, set())
    return digest.hexdigest()


def _add_module(digest: hashlib._Hash, module: nn.Module, seen: set[int]) -> None:
    digest.update(_text(module))
    # Buffers that are not part of the state dict, such as a mean, change the logits too.
    for name, value in {**module.state_dict(), **dict(module.named_buffers())}.items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(tensor_bytes(value))
        else:  # of a module with `get_extra_state`
            digest.update(_text((name, value)))
    # So do a mean and std that are neither buffers nor parameters.
    modules = list(module.named_modules())
    seen |= {id(part) for _, part in modules}
    for prefix, part in modules:
        for name, value in vars(part).items():
            if name not in _OWN and not _is_computed(part, name):
                _add_value(digest, f"{prefix}.{name}", value, seen)


def _add_value(digest: hashlib._Hash, name: str, value: object, seen: set[int]) -> None:
    """Adds an attribute of a kind that tells models apart; ignores any other."""
    if isinstance(value, np.ndarray | np.generic):
        digest.update(_text((name, value.dtype, value.shape)))
        digest.update(value.tobytes() if value.dtype != object else b"")
    elif isinstance(value, Tensor):
        digest.update(_text((name, value.dtype, tuple(value.shape))))
        if not value.is_quantized and not value.is_meta:
            digest.update(tensor_bytes(value.to_dense()))
    elif value is None or isinstance(value, str | bool | int | float | complex):
        digest.update(_text((name, value)))
    elif id(value) in seen:
        return  # a module that was added already, or a list that holds itself
    elif isinstance(value, nn.Module):  # one hidden from torch in a list
        _add_module(digest, value, seen)
    elif isinstance(value, tuple | list | dict):
        seen.add(id(value))
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            _add_value(digest, f"{name}[{key}]", item, seen)


def _is_computed(module: nn.Module, name: str) -> bool:
    """Whether weight_norm, spectral_norm or pruning computes this attribute in each pass."""
    parameters = vars(module)["_parameters"]
    return f"{name}_orig" in parameters or f"{name}_g" in parameters


def tensor_bytes(values: Tensor) -> bytes:
    """The bytes of a tensor's values in order."""
    return values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _text(value: object) -> bytes:
    return _ADDRESS.sub("", repr(value)).encode()
