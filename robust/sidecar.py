"""The sidecar: everything about a checkpoint except its weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from robust.classifier import Architecture
from robust.threat_model import ThreatModel

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class DataRecord:
    """The images that a model was trained on."""

    name: str
    count: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """The content of `robust_model.json`; loading needs only `architecture` and `classes`."""

    architecture: Architecture
    classes: tuple[str, ...]
    threat_model: ThreatModel | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    data: DataRecord | None = None
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    duration_seconds: float | None = None
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    weights_sha256: str = ""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if len(self.classes) != self.architecture.num_classes:
            raise ValueError(
                f"expected {self.architecture.num_classes} class names, got {len(self.classes)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, the format version first."""
        values = {"format_version": self.format_version, **asdict(self)}
        if not self.architecture.variant:  # so that older versions can read it
            del values["architecture"]["variant"]
        values["classes"] = list(self.classes)
        return values


def is_foreign(text: bytes) -> bool:
    """Whether this is JSON of another kind, such as a list or the result of an evaluation."""
    names = _names(text)
    return names is not None and not _is_own(names)


def is_sidecar(text: bytes) -> bool:
    """Whether this is a sidecar of any version, valid or not."""
    return _is_own(_names(text) or set())


def _is_own(names: set[str]) -> bool:
    # Results have the hash too, and other programs' files an architecture.
    return "format_version" in names or {"architecture", "weights_sha256"} <= names


def _names(text: bytes) -> set[str] | None:
    """The top-level names of a JSON object, none of another value; None for other text."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return set(values) if isinstance(values, dict) else set()


def parse_sidecar(text: bytes) -> Sidecar:
    """Read and validate a sidecar. Raises ValueError that says what was expected and found."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON, got incomplete or malformed text: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {type(values).__name__}")
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"expected format_version {FORMAT_VERSION}, got {version!r}")
    known = {item.name for item in fields(Sidecar)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"expected the fields of format {FORMAT_VERSION}, got also {unknown}")
    for name, types in _TYPES.items():
        if name in values and not isinstance(values[name], types):
            raise ValueError(f"expected another type for {name}, got {type(values[name]).__name__}")
    missing = sorted({"architecture", "classes", "weights_sha256"} - set(values))
    if missing:
        raise ValueError(f"expected the fields {missing}, got none of that name")
    if not all(isinstance(name, str) for name in values["classes"]):
        raise ValueError("expected class names to be strings")
    values["architecture"] = _build(Architecture, values["architecture"], tuples=("mean", "std"))
    values["classes"] = tuple(values["classes"])
    if values.get("threat_model") is not None:
        values["threat_model"] = _build(ThreatModel, values["threat_model"])
    if values.get("data") is not None:
        values["data"] = _build(DataRecord, values["data"])
    return Sidecar(**values)


_NUMBER = (int, float, type(None))
_TYPES: dict[str, type | tuple[type, ...]] = {
    "architecture": dict,
    "classes": list,
    "threat_model": (dict, type(None)),
    "recipe": dict,
    "data": (dict, type(None)),
    "seed": (int, type(None)),
    "versions": dict,
    "device": str,
    "duration_seconds": _NUMBER,
    "evaluation": list,
    "weights_sha256": str,
}


def _build(kind: type[Any], values: dict[str, Any], tuples: tuple[str, ...] = ()) -> Any:
    values = {k: tuple(v) if k in tuples and isinstance(v, list) else v for k, v in values.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"expected the fields of {kind.__name__}: {error}") from None
