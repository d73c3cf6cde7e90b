"""Converts recipes to and from the values of TOML and JSON, and overrides fields."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_origin

from robust.loading.options import NAMED_MEANS, NAMED_STDS
from robust.sizes import format_eps, parse_eps
from training.field_types import hints, is_size, unwrap
from training.recipe import Recipe

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def recipe_from_values(values: object) -> Recipe:
    """Build a recipe from the values of a TOML or JSON file; missing fields have their defaults.

    `eps` and `alpha` may be text such as ``8/255``, `mean` and `std` a name such as
    ``imagenet``; a named mean brings its std.
    Raises ValueError, as ``adversarial.epochs: expected ..., got ...``.
    """
    if isinstance(values, Mapping) and _is_named(values.get("mean")):
        values = {"std": values["mean"], **values}
    built = _build(Recipe, values, "")
    assert isinstance(built, Recipe)
    return built


def override(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """The recipe with some fields set, each written as ``FIELD=VALUE``.

    FIELD is a field of the recipe (``batch_size``), or one of a phase after the phase's name
    (``adversarial.epochs``, ``clean.augmentation.cutout``, ``strong.parts.0.steps``). VALUE is
    JSON, or text without quotes. Raises ValueError that names the field.
    """
    values = json.loads(json.dumps(recipe.to_dict()))
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise ValueError(f"--set: expected FIELD=VALUE, got {assignment[:80]!r}")
        path = path.strip()
        value = _parse(text.strip())
        target, name = _locate(values, path)
        target[name] = value
        if path == "mean" and _is_named(value):
            values["std"] = value
    return recipe_from_values(values)


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML with every field; `recipe_from_values` reads an equal one back."""
    lines = list(_assignments(recipe, skip="phases"))
    for phase in recipe.phases:
        lines += ["", "[[phases]]", *_assignments(phase, skip="parts")]
        for part in phase.parts:
            lines += ["[[phases.parts]]", *_assignments(part)]
    return "\n".join(lines) + "\n"


def _assignments(value: Any, skip: str = "") -> Iterable[str]:
    for name, hint in hints(type(value)).items():
        if name != skip:
            yield f"{name} = {_toml_value(getattr(value, name), size=is_size(hint))}"


def _toml_value(value: Any, *, size: bool = False) -> str:
    if is_dataclass(value):
        return "{ " + ", ".join(_assignments(value)) + " }"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    if size and "/" in format_eps(value) and parse_eps(format_eps(value)) == value != 0:
        return f'"{format_eps(value)}"'
    return json.dumps(value, ensure_ascii=False)  # of text, numbers and booleans: the same in TOML


def _build(kind: Any, values: object, path: str) -> Any:
    """A dataclass from a mapping of its fields, which checks itself."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{path or 'recipe'}: expected a table of fields, got {_shown(values)}")
    known = hints(kind)
    for name in values:
        if name not in known:
            where = f"{path}.{name}".lstrip(".")
            raise ValueError(f"{where}: expected field to be one of {_choices(name, known)}")
    missing = [
        item.name
        for item in fields(kind)
        if item.default is MISSING and item.default_factory is MISSING and item.name not in values
    ]
    if missing:
        raise ValueError(f"{path or 'recipe'}: expected the field {missing[0]}, got none")
    return kind(
        **{
            name: _convert(value, known[name], f"{path}.{name}".lstrip("."))
            for name, value in values.items()
        }
    )


def _convert(value: object, hint: Any, path: str) -> Any:
    bare, _ = unwrap(hint)
    if is_dataclass(bare):
        return _build(bare, value, path)
    if get_origin(bare) is tuple and isinstance(value, list | tuple):
        inner = get_args(bare)[0]
        return tuple(
            _convert(item, inner, _item_path(item, path, i)) for i, item in enumerate(value)
        )
    if path in ("mean", "std") and _is_named(value):
        return (NAMED_MEANS if path == "mean" else NAMED_STDS)[str(value)]
    if path in ("mean", "std") and isinstance(value, str):
        raise ValueError(
            f"{path}: expected 3 numbers or a name such as imagenet, got {_shown(value)}"
        )
    if is_size(hint) and isinstance(value, str):
        try:
            return parse_eps(value)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return value


def _is_named(value: object) -> bool:
    return isinstance(value, str) and value in NAMED_MEANS


def _item_path(item: object, path: str, index: int) -> str:
    """The path of an item for errors: its name as in ``--set``, or its index without a name."""
    name = item.get("name") if isinstance(item, Mapping) else None
    return name if isinstance(name, str) and name else f"{path}.{index}"


def _locate(values: dict[str, Any], path: str) -> tuple[Any, Any]:
    """The container and the key that `path` names in the values of a recipe."""
    names = path.split(".")
    phases = {phase["name"]: phase for phase in values["phases"]}
    if names[0] in phases:
        return _locate_in_phase(phases[names[0]], names[1:], path)
    known = [*(name for name in values if name != "phases"), *(f"{name}.FIELD" for name in phases)]
    if len(names) > 1 or names[0] not in known:
        raise ValueError(f"--set {path}: expected field to be one of {_choices(path, known)}")
    return values, names[0]


def _locate_in_phase(phase: dict[str, Any], names: Sequence[str], path: str) -> tuple[Any, Any]:
    target: Any = phase
    for depth, name in enumerate(names):
        key: Any = name
        if isinstance(target, list):
            key = int(name) if re.fullmatch(r"[0-9]{1,3}", name) else -1
            if not 0 <= key < len(target):
                raise ValueError(
                    f"--set {path}: expected parts.0 to parts.{len(target) - 1}, got {name[:40]!r}"
                )
        elif not isinstance(target, dict) or name not in target:
            known = list(target) if isinstance(target, dict) else []
            raise ValueError(f"--set {path}: expected field to be one of {_choices(name, known)}")
        if depth == len(names) - 1:
            return target, key
        target = target[key]
    raise ValueError(f"--set {path}: expected a field after the phase's name, got none")


def _parse(text: str) -> Any:
    """The value of an override: JSON, a number, a list without brackets, or plain text."""
    for candidate in (text, f"[{text}]" if "," in text else ""):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(candidate)
    return float(text) if _NUMBER.fullmatch(text) else text


def _choices(name: object, known: Iterable[str]) -> str:
    """The known names, a close match first, and the given name, as text for an error."""
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    ordered = [*close, *(item for item in names if item not in close)]
    return f"{', '.join(ordered) or 'none'}, got {str(name)[:60]!r}"


def _shown(value: object) -> str:
    return repr(value)[:80]
