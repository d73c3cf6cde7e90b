"""Checkpoints: a plain state dict beside a JSON sidecar, read safely and written atomically."""

from __future__ import annotations

import contextlib
import io
import logging
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust import files
from robust.classifier import Architecture, Classifier
from robust.sidecar import Sidecar, parse_sidecar

logger = logging.getLogger(__name__)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int64, torch.int32)


class CheckpointError(ValueError):
    """A checkpoint that can't be used: which file, what was expected, what was found."""

    def __init__(self, path: Path | str, expected: str, found: str) -> None:
        super().__init__(f"{path}: expected {expected}, found {found}")
        self.path, self.expected, self.found = str(path), expected, found

    def __reduce__(self) -> tuple[Any, ...]:  # sent from process to process
        return type(self), (self.path, self.expected, self.found)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded classifier, in eval mode, with its sidecar. `sha256` is that of the weights file."""

    classifier: Classifier
    sidecar: Sidecar
    sha256: str
    path: Path


def sidecar_path(path: Path) -> Path:
    """The sidecar beside a weights file: the same name with ending ``.json``."""
    return path.with_suffix(".json")


def save_checkpoint(
    path: Path | str,
    classifier: Classifier,
    sidecar: Sidecar,
    *,
    dtype: torch.dtype = torch.float16,
) -> Sidecar:
    """Write the weights as a plain state dict and the sidecar beside them; return the sidecar.

    Both are staged and flushed before the first rename, weights go first, and a sidecar staged for
    weights already in place is found again by `load_checkpoint`: a crash at any moment leaves a
    pair that loads. Raises CheckpointError when the disk is full or the folder not writable.
    """
    path = _weights_path(path)
    if sidecar.architecture != classifier.architecture:
        raise CheckpointError(path, f"a sidecar of {classifier.architecture}", "another one's")
    state = {
        key: value.detach().cpu().to(dtype) if value.is_floating_point() else value.detach().cpu()
        for key, value in classifier.net.state_dict().items()
    }
    if not all(bool(value.isfinite().all()) for value in state.values()):
        raise CheckpointError(path, f"finite weights in {dtype}", "NaN or infinite ones")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    weights = buffer.getvalue()
    sidecar = replace(sidecar, weights_sha256=sha256(weights).hexdigest())
    target, pending = sidecar_path(path), _pending_path(path)
    try:
        _finish_interrupted_save(path)
        staged = files.stage(path, lambda file: file.write(weights))
        try:
            files.write_json(pending, sidecar.to_dict())
            files.commit(staged, path)
        except BaseException:
            if staged.exists():  # else the weights are in place and need the pending sidecar
                staged.unlink()
                pending.unlink(missing_ok=True)
            raise
        files.commit(pending, target)
    except OSError as error:
        raise CheckpointError(path, "a folder that can be written to", _reason(error)) from error
    return sidecar


def load_checkpoint(path: Path | str, *, device: torch.device | str = "cpu") -> Checkpoint:
    """Load a checkpoint: with its sidecar, or a bare state dict whose keys say what it is.

    The sidecar lies beside `path` or, where that is a link, beside what it leads to. What a bare
    state dict can't say is guessed, see `infer_architecture`, with a warning. Weights are read
    with ``weights_only=True`` and against the sidecar's SHA-256. Raises CheckpointError naming
    the file, what was expected and what was found.
    """
    path = _weights_path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(path, "a checkpoint", _reason(error)) from error
    digest = sha256(data).hexdigest()
    sidecar = _read_sidecar(path, digest)
    state = _read_state(path, data)
    if sidecar is None:
        architecture = infer_architecture(path, state)
        logger.warning(
            "%s has no sidecar %s: taken as %s with %s, pixels in [0, 1], and classes 0 to %d",
            path,
            sidecar_path(path).name,
            architecture.arch,
            architecture.activation,
            architecture.num_classes - 1,
        )
        sidecar = Sidecar(
            architecture=architecture,
            classes=tuple(str(k) for k in range(architecture.num_classes)),
            weights_sha256=digest,
        )
    classifier = Classifier(sidecar.architecture)
    _fill(path, classifier, state)
    classifier.eval().requires_grad_(False).to(device)
    return Checkpoint(classifier=classifier, sidecar=sidecar, sha256=digest, path=path)


def record_evaluation(checkpoint: Checkpoint, rows: Sequence[dict[str, Any]]) -> Sidecar:
    """Add measured accuracies to the sidecar of `checkpoint` and return it.

    A row takes the place of one with the same images, attack, norm and eps: what was measured on
    some images of a set stands beside what was measured on all. Raises CheckpointError when the
    weights on disk are others by now, or there is no sidecar or it can't be written.
    """
    path = checkpoint.path
    try:
        found = files.sha256_file(path)
        if found != checkpoint.sha256:
            raise CheckpointError(path, f"the measured weights {checkpoint.sha256}", found)
        sidecar = _read_sidecar(path, found)
        if sidecar is None:
            raise CheckpointError(sidecar_path(path), "a sidecar to add results to", "none")
        kept = {_row_key(row): row for row in [*sidecar.evaluation, *rows]}
        sidecar = replace(sidecar, evaluation=list(kept.values()))
        files.write_json(sidecar_path(_described(path)), sidecar.to_dict())
    except OSError as error:
        raise CheckpointError(path, "a folder that can be written to", _reason(error)) from error
    return sidecar


def _row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("data", "data_sha256", "attack", "norm", "eps"))


def infer_architecture(path: Path, state: Mapping[str, Tensor]) -> Architecture:
    """Read architecture, stem and K off the keys and shapes of a bare state dict.

    What they can't tell is taken as relu, 32 pixels, no normalisation. Raises CheckpointError.
    """
    expected = "the keys of torchvision's resnet18, resnet34 or resnet50"
    stem, head = state.get("conv1.weight"), state.get("fc.weight")
    if stem is None or head is None or stem.ndim != 4 or head.ndim != 2:
        shown = ", ".join(list(state)[:3]) or "none"
        raise CheckpointError(path, expected, f"{len(state)} keys such as {shown}"[:200])
    blocks = [
        len({m[1] for key in state if (m := re.match(rf"layer{layer}\.(\d+)\.", key))})
        for layer in (1, 2, 3, 4)
    ]
    bottleneck = "layer1.0.conv3.weight" in state
    archs = {(False, (2, 2, 2, 2)): "resnet18", (False, (3, 4, 6, 3)): "resnet34"}
    archs[(True, (3, 4, 6, 3))] = "resnet50"
    arch = archs.get((bottleneck, tuple(blocks)))  # type: ignore[arg-type]
    kernel = tuple(stem.shape[2:])
    stems = {(7, 7): "imagenet", (3, 3): "cifar"}
    if arch is None or kernel not in stems:
        kind = "bottleneck" if bottleneck else "basic"
        raise CheckpointError(path, expected, f"{kind} blocks {blocks} behind a {kernel} stem")
    try:
        return Architecture(arch=arch, stem=stems[kernel], num_classes=len(head))  # type: ignore[arg-type]
    except ValueError as error:
        raise CheckpointError(path, expected, str(error)) from None


def _weights_path(path: Path | str) -> Path:
    path = Path(path)
    if path == sidecar_path(path):
        raise CheckpointError(path, "the weights beside the sidecar", "the sidecar's own name")
    return path


def _finish_interrupted_save(path: Path) -> None:
    """Put the sidecar in place that a crash between the two renames left pending.

    The next save would write over it, and should that fail nothing would describe the weights.
    """
    pending = _pending_path(path)
    if not pending.exists() or not path.exists():
        return
    with contextlib.suppress(ValueError):
        if parse_sidecar(pending.read_bytes()).weights_sha256 == files.sha256_file(path):
            files.commit(pending, sidecar_path(path))


def _pending_path(path: Path) -> Path:
    return sidecar_path(path).with_suffix(".json.new")


def _described(path: Path) -> Path:
    """`path`, or what it links to where only that has a sidecar."""
    has_own = sidecar_path(path).exists() or _pending_path(path).exists()
    return path if has_own or not path.is_symlink() else path.resolve()


def _read_sidecar(path: Path, digest: str) -> Sidecar | None:
    """The sidecar of these weights; None where there is none at all."""
    path, mismatch = _described(path), None
    for candidate in (sidecar_path(path), _pending_path(path)):
        try:
            sidecar = parse_sidecar(candidate.read_bytes())
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CheckpointError(candidate, "a sidecar", _reason(error)) from error
        except ValueError as error:
            mismatch = mismatch or CheckpointError(candidate, "a valid sidecar", str(error))
            continue
        if sidecar.weights_sha256 == digest:
            return sidecar
        mismatch = mismatch or CheckpointError(
            path, f"weights with SHA-256 {sidecar.weights_sha256[:80]} as in its sidecar", digest
        )
    if mismatch:
        raise mismatch
    return None


def _read_state(path: Path, data: bytes) -> dict[str, Tensor]:
    expected = "a state dict saved by torch.save"
    if not data:
        raise CheckpointError(path, expected, "an empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on unusual pickles: the error below says more
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f"a pickle that asks for {refused[1]}" if refused else "a file that is none"
        raise CheckpointError(path, expected, found) from None
    except Exception as error:  # torch raises whatever it trips over in a broken file
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointError(path, expected, f"a truncated or foreign file ({reason})") from None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise CheckpointError(path, "a plain dict of names and tensors", type(state).__name__)
    return state


def _fill(path: Path, classifier: Classifier, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into the network, or say which key is wrong and how."""
    own = classifier.net.state_dict()
    name = f"{classifier.architecture.arch} with {classifier.architecture.num_classes} classes"
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    # Older torch wrote no batch counters; nothing depends on them.
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        found = f"{len(missing)} keys missing ({', '.join(missing[:3])})" if missing else ""
        more = f"{len(unexpected)} unknown ({', '.join(unexpected[:3])})" if unexpected else ""
        raise CheckpointError(
            path, f"the keys of {name}", " and ".join(filter(None, (found, more)))
        )
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise CheckpointError(
                path,
                f"{key} of shape {tuple(own[key].shape)} ({name})",
                f"shape {tuple(value.shape)}",
            )
        floating = own[key].is_floating_point()
        if value.dtype not in (_FLOATS if floating else _INTEGERS) or value.is_sparse:
            expected = f"{key} of {'floats' if floating else 'whole numbers'}"
            raise CheckpointError(path, expected, f"{value.dtype} in {value.layout}")
        if not bool(value.isfinite().all()):
            raise CheckpointError(path, "finite weights", f"NaN or infinite ones in {key}")
    classifier.net.load_state_dict(dict(state), strict=False)


def _reason(error: OSError) -> str:
    return (error.strerror or str(error) or type(error).__name__).lower()
