"""Reads weights files of many formats to a plain state dict."""

from __future__ import annotations

import io
import json
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust.choices import Rgb
from robust.loading.errors import CheckpointError, first_line

# Entries that hold the weights of a model, best first.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "params", "ema")
PREFIXES = ("module.", "model.", "net.", "network.", "backbone.", "_orig_mod.", "0.", "1.")
_MEANS = ("mean", "mu", "new_mean", "_mean", "means")
_STDS = ("std", "sigma", "new_std", "_std", "stds", "sds")
# Used only in training: no output depends on them.
_UNUSED = re.compile(
    r"(^|\.)(n_averaged$|criterion\.|loss(_fn|_func)?\.|metrics?\.|(train|val|test)_(acc|metric)\w*\.)"
)

# Packages whose objects people save with weights: metrics, paths, settings of the run.
_BESIDE_WEIGHTS = {
    *("argparse", "datetime", "enum", "functools", "numpy", "pathlib", "types", "typing"),
    *("easydict", "lightning", "lightning_fabric", "ml_collections", "omegaconf", "yacs"),
    "pytorch_lightning",
}
_DICTIONARIES = ("easydict.EasyDict", "yacs.config.CfgNode")  # saved item by item
MAX_DEPTH = 20  # of dicts in dicts that are searched


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A plain state dict, and how it was extracted."""

    state: dict[str, Tensor]
    mean: Rgb | None = None  # of a normalization layer in the file
    std: Rgb | None = None
    notes: tuple[str, ...] = ()  # what was removed
    metadata: Mapping[str, str] = field(default_factory=dict)  # of a safetensors file


def read_weights(
    path: Path,
    data: bytes,
    *,
    known: Callable[[Mapping[str, Tensor]], bool],
    key: str | None = None,
) -> Weights:
    """The weights in the bytes of a file, without wrappers, prefixes and unused keys.

    `known` returns whether a state dict has the key names of a network; then no prefix is
    stripped. `key` names the entry with the weights. Pickles are read with
    ``weights_only=True``. Raises CheckpointError.
    """
    value, metadata = _read(path, data)
    state, notes = _find_state(path, value, key)
    state, mean, std = _take_normalization(path, state, notes)
    state = _drop_unused(state, notes)
    state = _drop_attacker(path, state, notes)
    state = _strip_prefixes(state, known, notes)
    return Weights(state=state, mean=mean, std=std, notes=tuple(notes), metadata=metadata)


def is_safetensors(data: bytes) -> bool:
    """Whether the bytes start like a safetensors file."""
    return data[8:9] == b"{" and 2 <= int.from_bytes(data[:8], "little") <= len(data) - 8


def describes_itself(data: bytes) -> bool:
    """Whether this is our own safetensors export, which needs no sidecar."""
    return is_safetensors(data) and is_ours(_metadata(data))


def is_ours(metadata: Mapping[str, str]) -> bool:
    """Whether this is the metadata of our own export, in safetensors or ONNX."""
    return {"architecture", "stem", "classes"} <= metadata.keys()


def recorded_classes(path: Path, metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The class names in the metadata of our own export. Raises CheckpointError."""
    try:
        return tuple(map(str, json.loads(metadata["classes"])))
    except (TypeError, ValueError, RecursionError) as error:
        found = f"{type(error).__name__}: {error}"
        raise CheckpointError(path, "the metadata of our export", found) from None


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file; empty if it has none or is broken."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (ValueError, RecursionError):
        return {}
    found = header.get("__metadata__") if isinstance(header, dict) else None
    return found if isinstance(found, dict) else {}


def _read(path: Path, data: bytes) -> tuple[Any, dict[str, str]]:
    if not data:
        raise CheckpointError(path, "a checkpoint", "an empty file")
    if is_safetensors(data):
        return _read_safetensors(path, data)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_inert(data)):
            warnings.simplefilter("ignore")  # on unusual pickles: the error below says more
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), {}
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f"another kind of file ({_reason(error)})"
        if data[:2] == b"PK":
            found = f"a pickle that torch does not load safely ({_reason(error)})"
            if "Unsupported operand" in found:
                found += "; torch.save it with the default pickle_protocol=2"
        if refused:
            found = (
                f"a pickle that refers to {refused[1]}, which is never run; save the state dict "
                "alone: torch.save(model.state_dict(), path)"
            )
        raise CheckpointError(path, "a state dict saved by torch.save", found) from None
    except Exception as error:  # torch raises all kinds of exceptions on a broken file
        found = f"a truncated or foreign file ({first_line(error)})"
        raise CheckpointError(path, "a state dict saved by torch.save", found) from None


def _reason(error: pickle.UnpicklingError) -> str:
    """The reason in torch's message, which is embedded in general advice."""
    return re.split(r"WeightsUnpickler error:\s*", str(error))[-1].strip().partition("\n")[0][:200]


class Inert:
    """A stand-in that ignores the state of an object saved with the weights, such as a path."""

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class InertDict:
    """A stand-in for a subclass of dict; its items are kept, as torch fills only dicts."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


def _inert(data: bytes) -> list[Any]:
    """A stand-in for each other object in a checkpoint, with the object's full name."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
    except Exception:  # not a zip of torch.save, or a broken one: loading it will raise
        return []
    return [
        (InertDict if name in _DICTIONARIES else Inert, name)
        for name in names
        if name.partition(".")[0] in _BESIDE_WEIGHTS
    ]


def _read_safetensors(path: Path, data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors.torch import load

    try:
        state: dict[str, Tensor] = load(data)
    except Exception as error:
        found = f"a broken one ({first_line(error)})"
        raise CheckpointError(path, "a safetensors file", found) from None
    return state, _metadata(data)


def _find_state(path: Path, value: Any, key: str | None) -> tuple[dict[str, Tensor], list[str]]:
    notes: list[str] = []
    if key is not None:
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                shown = _names(value) if isinstance(value, dict) else type(value).__name__
                raise CheckpointError(path, f"an entry {key!r}", shown)
            value = value[part]
        notes.append(f"read from its entry {key!r}")
    taken: list[str] = []
    holds = _holding_state(value)
    while not _is_state(value):
        if len(taken) > MAX_DEPTH:
            raise CheckpointError(path, "a state dict", "a dict that contains itself")
        holding = [name for name, item in _entries(value) if holds.get(id(item))]
        name = next((name for name in WRAPPERS if name in holding), None)
        if name is None and len(holding) == 1:
            name = holding[0]
        if name is None:
            found = (
                f"weights in each of {_names(holding)}: choose one with the option key"
                if holding
                else f"no weights in {_names(value)}"
                if isinstance(value, dict)
                else f"a {type(value).__name__}"
            )
            raise CheckpointError(path, "a state dict, or a file with only one", found)
        left = [other for other in holding if other != name]
        taken.append(f"{name!r}" + (f" (not {_names(left)}; see the option key)" if left else ""))
        value = value[name]
    if taken:
        notes.append(f"read from its entry {' in '.join(reversed(taken))}")
    state = {name: item for name, item in value.items() if isinstance(item, Tensor)}
    dropped = [name for name in value if name not in state]
    if dropped:
        notes.append(f"dropped entries that are not tensors: {_names(dropped)}")
    return state, notes


def _entries(value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return []
    return [(name, item) for name, item in value.items() if isinstance(name, str)]


def _is_state(value: Any) -> bool:
    """Whether this is a state dict: tensors by name, at least one of them a matrix."""
    items = _entries(value)
    return (
        bool(items)
        and len(items) == len(value)
        and not any(isinstance(item, dict) for _, item in items)
        and any(isinstance(item, Tensor) and item.ndim > 1 for _, item in items)
    )


def _holding_state(value: Any) -> dict[int, bool]:
    """By id of each dict in `value`: whether it is a state dict or holds one.

    Visits a dict once, however often it occurs, and none nested deeper than MAX_DEPTH.
    """
    found: dict[int, bool] = {}

    def visit(item: Any, depth: int) -> bool:
        if not isinstance(item, dict) or depth > MAX_DEPTH:
            return False
        if id(item) not in found:
            inner = [visit(entry, depth + 1) for _, entry in _entries(item)]
            found[id(item)] = _is_state(item) or any(inner)
        return found[id(item)]

    visit(value, 0)
    return found


def _take_normalization(
    path: Path, state: dict[str, Tensor], notes: list[str]
) -> tuple[dict[str, Tensor], Rgb | None, Rgb | None]:
    """The state dict without its normalization layer, and that layer's mean and std."""
    taken = {}
    for names in (_MEANS, _STDS):
        found = {
            key: value
            for key, value in state.items()
            if key.rpartition(".")[2] in names and value.numel() == 3 and value.is_floating_point()
        }
        values = {tuple(value.flatten().double().tolist()) for value in found.values()}
        if len(values) > 1:
            raise CheckpointError(
                path, "one normalization", f"different ones in {_names(list(found))}"
            )
        taken[names] = (found, values.pop() if values else None)
    (means, mean), (stds, std) = taken[_MEANS], taken[_STDS]
    if mean is None or std is None:
        return state, None, None
    keys = {*means, *stds}
    # As the authors wrote it: 0.4914, not float32's 0.4914000034.
    mean, std = (tuple(float(f"{number:.7g}") for number in values) for values in (mean, std))
    notes.append(f"took mean {_numbers(mean)} and std {_numbers(std)} from {_names(sorted(keys))}")
    rest = {key: value for key, value in state.items() if key not in keys}
    return rest, mean, std  # type: ignore[return-value]


def _drop_unused(state: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    unused = [key for key in state if _UNUSED.search(key)]
    if unused:
        notes.append(f"dropped {_names(unused)}, which no output depends on")
    return {key: value for key, value in state.items() if key not in unused}


def _drop_attacker(path: Path, state: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Drop the second copy of the model that MadryLab's robustness saves inside its attacker."""
    copies = [key for key in state if "attacker.model." in key]
    for key in copies:
        other = state.get(key.replace("attacker.", "", 1))
        if other is None or not torch.equal(other, state[key]):
            raise CheckpointError(
                path, "the same model inside and outside the attacker", f"another {key}"
            )
    if copies:
        notes.append("dropped the attacker's copy of the model")
    return {key: value for key, value in state.items() if key not in copies}


def _strip_prefixes(
    state: dict[str, Tensor], known: Callable[[Mapping[str, Tensor]], bool], notes: list[str]
) -> dict[str, Tensor]:
    stripped = ""
    while state and not known(state):
        prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        stripped += prefix
    if stripped:
        notes.append(f"stripped the prefix {stripped!r}")
    return state


def _names(names: Any) -> str:
    """Up to five names, separated by commas, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(map(str, names[:5])) or "nothing") + more


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)
