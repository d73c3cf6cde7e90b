"""Checkpoints: a plain state dict and a JSON sidecar, read safely and written atomically."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from robust import files, networks
from robust.classifier import Classifier
from robust.device import compare_with_cpu, resolve_device
from robust.loading.describe import (
    Described,
    contradiction,
    describe,
    fill,
    is_known,
    log_lines,
    with_head_bias,
)
from robust.loading.errors import CheckpointError, reason
from robust.loading.given import (
    Given,
    classifier_of,
    is_code,
    is_service,
    open_code,
    open_file,
    probe,
    shown,
)
from robust.loading.hub import open_folder
from robust.loading.options import ModelOptions, model_options
from robust.loading.weights import describes_itself, read_weights
from robust.networks.layers import SkipInitialization
from robust.sidecar import Sidecar, is_foreign, parse_sidecar

if TYPE_CHECKING:
    from robust.attacks import AttackSettings

logger = logging.getLogger(__name__)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "load_checkpoint",
    "load_model",
    "model_options",
    "record_evaluation",
    "save_checkpoint",
    "sidecar_path",
]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded classifier, in eval mode, with its sidecar. `sha256` is that of the weights file."""

    classifier: Classifier
    sidecar: Sidecar
    sha256: str
    path: Path
    guessed: Mapping[str, str] = field(default_factory=dict)  # property: how it was guessed
    notes: tuple[str, ...] = ()  # what was changed in reading it, and other interpretations

    def check_attacks(self, attacks: Sequence[AttackSettings]) -> None:
        """Raise ValueError for attacks that need gradients if the model has none."""
        if self.classifier.differentiable:
            return
        refused = [attack.label for attack in attacks if attack.uses_gradient]
        if refused:
            raise ValueError(
                f"{shown(self.path)}: expected attacks without gradients, such as square, got "
                f"{', '.join(refused)}: {self.sidecar.architecture.arch} models give none"
            )

    def origin(self) -> dict[str, Any]:
        """The model as JSON values: file, hash, architecture, and everything guessed."""
        return {
            "path": shown(self.path),
            "sha256": self.sha256,
            "architecture": self.sidecar.to_dict()["architecture"],
            "guessed": dict(self.guessed),
            "notes": list(self.notes),
        }


def sidecar_path(path: Path) -> Path:
    """The sidecar of a weights file: the same name with the suffix ``.json``."""
    return path.with_suffix(".json")


def save_checkpoint(
    path: Path | str,
    classifier: Classifier,
    sidecar: Sidecar,
    *,
    dtype: torch.dtype = torch.float16,
) -> Sidecar:
    """Write the weights as a plain state dict with their sidecar; return the sidecar.

    Both are staged and flushed before the first rename, the weights are renamed first, and
    `load_checkpoint` finds a sidecar staged for weights already in place: a crash at any moment
    leaves a pair that loads. Raises CheckpointError if the disk is full or the folder is not
    writable.
    """
    path = _weights_path(path)
    if sidecar.architecture != classifier.architecture:
        raise CheckpointError(path, f"a sidecar of {classifier.architecture}", "another's")
    state = {
        key: value.detach().cpu().to(dtype) if value.is_floating_point() else value.detach().cpu()
        for key, value in classifier.net.state_dict().items()
    }
    if not all(bool(value.isfinite().all()) for value in state.values()):
        raise CheckpointError(path, f"finite weights in {dtype}", "NaN or infinite ones")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    weights = buffer.getvalue()
    sidecar = replace(sidecar, weights_sha256=hashlib.sha256(weights).hexdigest())
    target, pending = sidecar_path(path), _pending_path(path)
    try:
        _finish_interrupted_save(path)
        staged = files.stage(path, lambda file: file.write(weights))
        try:
            files.write_json(pending, sidecar.to_dict())
            files.commit(staged, path)
        except BaseException:
            if staged.exists():  # otherwise the weights are in place and need the pending sidecar
                files.discard(staged)
                pending.unlink(missing_ok=True)
            raise
        files.commit(pending, target)
    except OSError as error:
        raise CheckpointError(path, "a folder that can be written to", reason(error)) from error
    return sidecar


def load_checkpoint(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    options: ModelOptions | None = None,
) -> Checkpoint:
    """Load a model in any format listed in `docs/formats.md`.

    Our own checkpoints have a sidecar, in the folder of `path` or, for a link, of its target.
    Without a sidecar the network is inferred from keys and shapes; `options` give the rest, and
    every guess is logged as a warning. Weights are read with ``weights_only=True`` and checked
    against the sidecar's SHA-256. Raises CheckpointError that names the file, what was expected
    and what was found.
    """
    spec, options = str(path), options or ModelOptions()
    if is_service(spec):
        from robust.loading.service import open_service

        return _given(spec, open_service(spec), options, device)
    if is_code(spec):
        return _given(spec, open_code(spec), options, device)
    path = _weights_path(path)
    if path.is_dir():
        path, options = open_folder(path, options)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(path, "a checkpoint", reason(error)) from error
    given = open_file(path, data)
    if given is not None:
        return _given(spec, given, options, device)
    digest = hashlib.sha256(data).hexdigest()
    # A sidecar of the same name is that of the checkpoint it was exported from.
    sidecar = None if describes_itself(data) else _read_sidecar(path, digest)
    if sidecar is not None:
        differing = contradiction(options, sidecar.architecture, sidecar.classes)
        if differing:
            raise CheckpointError(
                path, "options that agree with its sidecar", f"others; the sidecar has {differing}"
            )
    weights = read_weights(
        path, data, known=lambda state: is_known(state, options), key=options.key
    )
    if sidecar is not None:
        found = Described(
            architecture=sidecar.architecture,
            classes=sidecar.classes,
            state=weights.state,
            notes=weights.notes,
        )
    else:
        found = describe(path, weights, options)
        sidecar = Sidecar(
            architecture=found.architecture, classes=found.classes, weights_sha256=digest
        )
    with SkipInitialization():
        classifier = Classifier(found.architecture)
    found = with_head_bias(classifier, found)
    fill(path, classifier, found.state)
    if networks.family_of(found.architecture.arch).read is None:  # may need larger images
        probe(path, classifier, found.architecture.input_size)
    return _loaded(path, classifier, found, sidecar=sidecar, device=device)


def _given(
    spec: str, given: Given, options: ModelOptions, device: torch.device | str
) -> Checkpoint:
    """A checkpoint of a model that is not a weights file."""
    classifier, sha256, found = classifier_of(spec, given, options)
    sidecar = Sidecar(architecture=found.architecture, classes=found.classes, weights_sha256=sha256)
    return _loaded(Path(spec), classifier, found, sidecar=sidecar, device=device)


def _loaded(
    path: Path,
    classifier: Classifier,
    found: Described,
    *,
    sidecar: Sidecar,
    device: torch.device | str,
) -> Checkpoint:
    """The checkpoint on the device; logs what was guessed."""
    for line in log_lines(found):
        logger.warning("%s: %s", shown(path), line)
    classifier.classes = found.classes
    return Checkpoint(
        classifier=_on_device(classifier, device),
        sidecar=sidecar,
        sha256=sidecar.weights_sha256,
        path=path,
        guessed=found.guessed,
        notes=found.notes,
    )


def _on_device(classifier: Classifier, device: torch.device | str) -> Classifier:
    """Move the model to the device, in eval mode and frozen. Raises DeviceDisagrees.

    A model without gradients stays where it is: in ONNX Runtime on the CPU, or in a service.
    """
    classifier.eval().requires_grad_(False)
    if not classifier.differentiable:
        return classifier
    compare_with_cpu(classifier, torch.device(device), classifier.architecture.input_size)
    return classifier.to(device)


def load_model(
    model: Path | str,
    *,
    device: torch.device | str = "cpu",
    arch: str | None = None,
    stem: str | None = None,
    activation: str | None = None,
    input_size: int | None = None,
    mean: str | float | Sequence[float] | None = None,
    std: str | float | Sequence[float] | None = None,
    classes: str | Sequence[str] | None = None,
    key: str | None = None,
) -> Classifier:
    """The classifier in a file, folder or service, in eval mode: images in [0, 1] to logits.

    `model` is as for the command line's ``--model``, see ``docs/formats.md``. `device` ``"auto"``
    is the accelerator that torch finds, else the CPU. The other arguments describe a bare state
    dict, like the command line's options: `mean` and `std` are 3 numbers or a name such as
    ``imagenet``. The classifier has `classes` and `architecture`. Every guess is logged as a
    warning. Raises CheckpointError, and ValueError for an invalid option.
    """
    options = model_options(
        arch=arch,
        stem=stem,
        activation=activation,
        input_size=input_size,
        mean=mean,
        std=std,
        classes=classes,
        key=key,
    )
    return load_checkpoint(model, device=resolve_device(device), options=options).classifier


def check_recordable(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if `checkpoint` has no sidecar that results can be added to."""
    sidecar = sidecar_path(_described(checkpoint.path))
    if not checkpoint.path.is_file() or not sidecar.is_file():
        raise CheckpointError(
            checkpoint.path, "a checkpoint with a sidecar to add results to", "none"
        )
    if not os.access(sidecar.parent, os.W_OK):
        raise CheckpointError(checkpoint.path, "a folder that can be written to", "no permission")


def record_evaluation(checkpoint: Checkpoint, rows: Sequence[dict[str, Any]]) -> Sidecar:
    """Add measured accuracies to the sidecar of `checkpoint` and return it.

    A row replaces one with the same images, attack, norm and eps; results on a subset of a data
    set are kept next to results on the whole set. Processes that record at the same time take
    turns. Raises CheckpointError if the weights on disk have changed, or if the sidecar is missing
    or can't be written.
    """
    path = checkpoint.path
    try:
        target = sidecar_path(_described(path))
        with files.locked(target.parent):
            found = files.sha256_file(path)
            if found != checkpoint.sha256:
                raise CheckpointError(path, f"the measured weights {checkpoint.sha256}", found)
            sidecar = _read_sidecar(path, found)
            if sidecar is None:
                raise CheckpointError(sidecar_path(path), "a sidecar to add results to", "none")
            kept = {_row_key(row): row for row in [*sidecar.evaluation, *rows]}
            sidecar = replace(sidecar, evaluation=list(kept.values()))
            files.write_json(target, sidecar.to_dict())
    except OSError as error:
        raise CheckpointError(path, "a folder that can be written to", reason(error)) from error
    return sidecar


def _row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("data", "data_sha256", "attack", "norm", "eps"))


def _weights_path(path: Path | str) -> Path:
    path = Path(path)
    if path.name and path == sidecar_path(path):
        raise CheckpointError(path, "the name of a weights file", "that of its sidecar")
    return path


def _finish_interrupted_save(path: Path) -> None:
    """Finish a save that crashed between its two renames by renaming the pending sidecar.

    The next save would overwrite it, and if that failed, nothing would describe the weights.
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
    """`path`, or its link target if only that has a sidecar."""
    has_own = sidecar_path(path).exists() or _pending_path(path).exists()
    return path if has_own or not path.is_symlink() else path.resolve()


def _read_sidecar(path: Path, digest: str) -> Sidecar | None:
    """The sidecar of these weights; None if there is none."""
    path, mismatch, foreign = _described(path), None, set[Path]()
    own, pending = sidecar_path(path), _pending_path(path)
    # `own` again, as a save may have renamed `pending` to it since it was read.
    for candidate in (own, pending, own):
        try:
            text = candidate.read_bytes()
            if is_foreign(text):
                if candidate not in foreign:
                    logger.warning("%s does not describe a checkpoint and is ignored", candidate)
                foreign.add(candidate)
                continue
            sidecar = parse_sidecar(text)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CheckpointError(candidate, "a sidecar", reason(error)) from error
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
