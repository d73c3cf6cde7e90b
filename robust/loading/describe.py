"""Determines the network of a bare state dict, from its keys, from options, or by guessing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from robust import networks
from robust.classifier import Architecture, Classifier
from robust.loading.errors import CheckpointError, of_model
from robust.loading.options import ModelOptions, check_unit_pixels
from robust.loading.weights import Weights, is_ours, recorded_classes

READ, ASSUMED, LIBRARY = "read off the keys", "assumed", "from the library's configuration"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int64, torch.int32)


@dataclass(frozen=True, kw_only=True)
class Described:
    """A state dict with our key names, and its network."""

    architecture: Architecture
    classes: tuple[str, ...]
    state: dict[str, Tensor]
    guessed: dict[str, str] = field(default_factory=dict)  # property: how it was found
    notes: tuple[str, ...] = ()


def is_known(state: Mapping[str, Tensor], options: ModelOptions) -> bool:
    """Whether the keys match a known network without renaming."""
    if options.arch is not None:
        arch, _ = split_arch(options.arch)
        if networks.family_of(arch).read is None:
            return f"{networks.library_configuration(arch).head}.weight" in state
    try:
        return networks.read_layout(_shapes(state)) is not None
    except networks.UnknownLayout:
        return True


def describe(path: Path, weights: Weights, options: ModelOptions) -> Described:
    """The network of these weights. Raises CheckpointError that names mismatches."""
    if is_ours(weights.metadata):
        return _from_metadata(path, weights, options)
    reading = _reading(path, weights.state, options)
    unused = set(reading.unused)
    state = {
        reading.renamed.get(key, key): value
        for key, value in weights.state.items()
        if reading.renamed.get(key, key) not in unused
    }
    notes = list(weights.notes)
    if reading.layout:
        notes.append(f"renamed the keys of a {reading.layout}")
    if unused:
        layers = ", ".join(sorted({key.partition(".")[0] for key in unused}))
        notes.append(f"dropped {len(unused)} keys that the network never uses ({layers})")
    half = {value.dtype for value in state.values()} & {torch.float16, torch.bfloat16}
    if half:
        kind = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in half))
        notes.append(f"converted {kind} weights to float32")
    guessed: dict[str, str] = {}
    values = _properties(reading, weights, options, guessed)
    try:
        for name in ("mean", "std"):
            check_unit_pixels(values[name])  # type: ignore[arg-type]
        architecture = Architecture(**values)  # type: ignore[arg-type]
    except ValueError as error:
        raise of_model(path, error) from None
    if {"stem", "variant"} & guessed.keys() or reading.stem == "own":
        notes += reading.doubts
    for name in ("mean", "std"):
        own = getattr(weights, name)
        if own not in (None, values[name]):
            replaced = ", ".join(f"{value:g}" for value in own)
            notes.append(f"the option {name} replaces the file's {replaced}")
    classes = options.classes
    if classes is None:
        classes = tuple(map(str, range(architecture.num_classes)))
        guessed["classes"] = ASSUMED
    return Described(
        architecture=architecture,
        classes=check_classes(path, classes, architecture),
        state=state,
        guessed=guessed,
        notes=tuple(notes),
    )


def split_arch(name: str) -> tuple[str, str | None]:
    """``name:variant`` in two; a library's name such as ``timm:resnet18`` is one.

    Raises ValueError for an unknown architecture.
    """
    try:
        networks.family_of(name)
        return name, None
    except ValueError:
        arch, colon, variant = name.partition(":")
        if not colon:
            raise
        networks.family_of(arch)
        return arch, variant


def with_head_bias(classifier: Classifier, found: Described) -> Described:
    """Add a zero bias to a head without one."""
    family = networks.family_of(found.architecture.arch)
    if family.read is None:
        return found
    head, state = family.head(classifier.net), found.state
    if f"{head}.bias" in state or f"{head}.weight" not in state:
        return found
    state = {**state, f"{head}.bias": torch.zeros(found.architecture.num_classes)}
    return replace(found, state=state, notes=(*found.notes, f"no {head}.bias: assumed to be zero"))


def fill(path: Path, classifier: Classifier, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into the network. Raises CheckpointError that lists up to five keys per kind."""
    own = classifier.net.state_dict()
    # Older versions of torch wrote no batch counters, and no output depends on them.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    left = [key for key in state if key not in own]
    shapes = [
        f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}"
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    ]
    architecture = classifier.architecture
    if problems := _problems(missing, left, shapes):
        name = f"{architecture.arch} with {architecture.num_classes} classes"
        raise CheckpointError(path, f"the keys of {name}", problems)
    for key, value in state.items():
        floating = own[key].is_floating_point()
        if value.dtype not in (_FLOATS if floating else _INTEGERS) or value.is_sparse:
            expected = f"{key} of {'floats' if floating else 'whole numbers'}"
            raise CheckpointError(path, expected, f"{value.dtype} in {value.layout}")
        if not _is_finite(value):
            raise CheckpointError(path, "finite weights", f"NaN or infinite ones in {key}")
    classifier.net.load_state_dict(dict(state), strict=False)


def _problems(missing: list[str], left: list[str], shapes: Sequence[str] = ()) -> str:
    return "; ".join(
        f"{len(items)} {kind} ({', '.join(items[:5])}{', ...' if len(items) > 5 else ''})"
        for kind, items in (
            ("missing", missing),
            ("left over", left),
            ("of another shape", shapes),
        )
        if items
    )


def _is_finite(value: Tensor) -> bool:
    """Whether no element is NaN or infinite; checks the sum first, in a tenth of the time."""
    total = value.sum(dtype=torch.float32) if value.is_floating_point() else value.sum()
    return bool(total.isfinite()) or bool(value.isfinite().all())


def log_lines(found: Described) -> list[str]:
    """Log lines that say how the file was interpreted and what was guessed."""
    lines = ["; ".join(found.notes)] if found.notes else []
    if found.guessed:
        architecture = found.architecture
        arch = ":".join(filter(None, (architecture.arch, architecture.variant)))
        words = {
            "arch": arch,
            "variant": "",
            "stem": f"stem {architecture.stem}",
            "activation": f"activation {architecture.activation}",
            "input_size": f"{architecture.input_size} pixels",
            "mean": f"mean {', '.join(f'{value:g}' for value in architecture.mean)}",
            "std": f"std {', '.join(f'{value:g}' for value in architecture.std)}",
            "classes": f"classes 0 to {architecture.num_classes - 1}",
        }
        parts = []
        for how in dict.fromkeys(found.guessed.values()):
            names = [words[name] for name, value in found.guessed.items() if value == how]
            parts.append(f"{how}: {', '.join(filter(None, names))}")
        options = [name.replace("_", " ") for name in found.guessed if name != "variant"]
        lines.append(f"{'; '.join(parts)} (see the options {', '.join(options)})")
    return lines


def contradiction(options: ModelOptions, architecture: Architecture, classes: object) -> str:
    """The first recorded property that the options contradict; empty if there is none."""
    recorded = {**vars(architecture), "classes": classes}
    for name, value in options.given().items():
        if name == "arch":
            arch, variant = split_arch(str(value))
            if (arch, variant or recorded["variant"]) != (recorded["arch"], recorded["variant"]):
                return f"arch {recorded['arch']}:{recorded['variant']}".rstrip(":")
        elif name != "key" and value != recorded[name]:
            return f"{name} {recorded[name]}"
    return ""


def _reading(path: Path, state: Mapping[str, Tensor], options: ModelOptions) -> networks.Reading:
    arch, variant = None, None
    try:
        if options.arch is not None:
            arch, variant = split_arch(options.arch)
            if networks.family_of(arch).read is None:
                return _library_reading(path, arch, state)
        reading = networks.read_layout(_shapes(state))
    except networks.UnknownLayout as error:
        raise CheckpointError(path, "a known network", str(error)) from None
    except ValueError as error:
        raise of_model(path, error) from None
    if reading is None:
        _check_head(path, _shapes(state))
        shown = ", ".join(list(state)[:5]) or "none"
        raise CheckpointError(
            path,
            f"the keys of {', '.join(networks.ARCHS)}, or arch timm:NAME, torchvision:NAME",
            f"{len(state)} keys such as {shown}"[:300],
        )
    if arch is not None and reading.arch != arch:
        raise CheckpointError(path, f"the keys of {arch}", f"those of {reading.arch}")
    if options.stem in reading.stems:
        reading = replace(reading, stem=options.stem, doubts=())
    elif options.stem is not None and options.stem != reading.stem:
        stems = dict.fromkeys(s for f in networks.FAMILIES for s in f.stems if s != "own")
        if options.stem not in stems:
            raise CheckpointError(path, f"a stem of {', '.join(stems)}", options.stem)
        raise CheckpointError(
            path,
            f"the {options.stem} stem",
            f"a {'x'.join(map(str, state['conv1.weight'].shape[2:]))} convolution, as in the "
            f"{reading.stem} stem",
        )
    return reading if variant is None else replace(reading, variant=variant, doubts=())


def _check_head(path: Path, shapes: Mapping[str, torch.Size]) -> None:
    """Raise CheckpointError for a known network whose head is not one linear layer."""
    for head in ("fc", "linear"):
        others = {key: shape for key, shape in shapes.items() if not key.startswith(f"{head}.")}
        added = [f"{head}.weight", f"{head}.bias"]
        with suppress(networks.UnknownLayout):
            reading = networks.read_layout({**others, added[0]: torch.Size((2, 1))})
            if reading is not None and len(others) < len(shapes):
                left = [key for key in shapes if key not in others]
                missing = [key for key in added if key not in shapes]
                found = f"{_problems(missing, left)}; for another head give the code, FILE.py:NAME"
                raise CheckpointError(path, f"the keys of {reading.arch}", found)


def _properties(
    reading: networks.Reading, weights: Weights, options: ModelOptions, guessed: dict[str, str]
) -> dict[str, object]:
    """The fields of the architecture; adds each guess to `guessed`."""
    arch, variant = (None, None) if options.arch is None else split_arch(options.arch)
    library = networks.family_of(reading.arch).read is None
    how = LIBRARY if library else ASSUMED
    values: dict[str, object] = {
        "arch": reading.arch,
        "variant": reading.variant,
        "stem": reading.stem,
        "num_classes": reading.num_classes,
    }
    if arch is None:
        guessed["arch"] = READ
    if variant is None and reading.variant:
        guessed["variant"] = READ
    if options.stem is None and not library:
        guessed["stem"] = READ
    values["activation"] = options.activation or reading.activation
    if options.activation is None and not library:
        guessed["activation"] = ASSUMED
    values["input_size"] = options.input_size or reading.input_size
    if options.input_size is None:
        guessed["input_size"] = how
    for name, nothing in (("mean", (0.0, 0.0, 0.0)), ("std", (1.0, 1.0, 1.0))):
        value = getattr(options, name) or getattr(weights, name)
        if value is None:
            value, guessed[name] = getattr(reading, name) or nothing, how
        values[name] = value
    return values


def _from_metadata(path: Path, weights: Weights, options: ModelOptions) -> Described:
    """The description in the metadata of our own safetensors export."""
    metadata, classes = weights.metadata, recorded_classes(path, weights.metadata)
    try:
        architecture = Architecture(
            arch=metadata["architecture"],
            stem=metadata["stem"],
            activation=metadata["activation"],
            variant=metadata.get("variant", ""),
            num_classes=len(classes),
            input_size=int(metadata["input_size"]),
            mean=tuple(json.loads(metadata["mean"])),
            std=tuple(json.loads(metadata["std"])),
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            path, "the metadata of our export", f"{type(error).__name__}: {error}"
        ) from None
    if differing := contradiction(options, architecture, classes):
        raise CheckpointError(
            path, "options that agree with its metadata", f"others; the metadata has {differing}"
        )
    return Described(
        architecture=architecture, classes=classes, state=weights.state, notes=weights.notes
    )


def _library_reading(path: Path, arch: str, state: Mapping[str, Tensor]) -> networks.Reading:
    """A network of timm or torchvision, by name, with the number of classes in the file."""
    configuration = networks.library_configuration(arch)
    head = state.get(f"{configuration.head}.weight")
    if head is None:
        own = [key for key in state if key.startswith(f"{configuration.head}.")]
        shown = ", ".join((own or list(state))[:5]) or "none"
        raise CheckpointError(
            path, f"{configuration.head}.weight of {arch}", f"{len(state)} keys such as {shown}"
        )
    return networks.Reading(
        arch=arch,
        stem="own",
        activation="own",
        num_classes=len(head),
        mean=configuration.mean,
        std=configuration.std,
        input_size=configuration.input_size,
        unused=tuple(key for key in state if key.startswith(networks.AUXILIARY)),
        doubts=networks.library_doubts(arch),
    )


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


def check_classes(
    path: Path | str, classes: tuple[str, ...], architecture: Architecture
) -> tuple[str, ...]:
    """The class names. Raises CheckpointError for another number of them."""
    if len(classes) != architecture.num_classes:
        found = f"{len(classes)}; set them with the option classes"
        raise CheckpointError(path, f"{architecture.num_classes} class names", found)
    return classes
