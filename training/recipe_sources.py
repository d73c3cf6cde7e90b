"""Loads a recipe by name, from a TOML or JSON file, or from a function of your own."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.recipe import Recipe
from training.recipe_values import recipe_from_values
from training.recipes import RECIPES, named_recipe

FORMS = "FILE.toml, FILE.json or package.module:function"
# Added by a run to the recipe in its sidecar.
_RECORDED = ("kept_epoch", "init", "validation", "minutes")


def load_recipe(source: str) -> Recipe:
    """Load the recipe given by `source`.

    `source` is the name of a built-in recipe, a TOML or JSON file of a recipe's fields, the
    ``run.json`` of a run or the sidecar of a checkpoint, or ``package.module:function``, where
    the function takes no arguments and returns a Recipe. Raises ValueError that names the source
    and the field.
    """
    if source in RECIPES:
        return named_recipe(source)
    path = Path(source)
    if path.suffix.lower() in (".toml", ".json") or path.is_file():
        return _from_file(path)
    if ":" in source:
        return _from_function(source)
    return named_recipe(source, others=FORMS)


def recorded_run(source: str) -> dict[str, Any]:
    """What a ``run.json`` or sidecar records beside its recipe; empty for other sources.

    Among it are the run's `seed`, `data`, `init`, `validation`, `classes` and `minutes`.
    """
    path = Path(source)
    if source in RECIPES or path.suffix.lower() != ".json" or not path.is_file():
        return {}
    values = _read(path)
    if not isinstance(values, Mapping) or not isinstance(values.get("recipe"), Mapping):
        return {}
    found = {**values["recipe"], **values}  # a sidecar has some in its recipe
    if isinstance(found.get("class_counts"), Mapping):  # of a run.json
        found["classes"] = list(found["class_counts"])
    return found


def _from_file(path: Path) -> Recipe:
    values = _read(path)
    if isinstance(values, Mapping) and isinstance(values.get("recipe"), Mapping):
        recorded = values["recipe"]
        values = {key: value for key, value in recorded.items() if key not in _RECORDED}
    try:
        return recipe_from_values(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read(path: Path) -> Any:
    try:
        text = path.read_bytes().decode()
        return tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:
        form = "TOML" if path.suffix.lower() == ".toml" else "JSON"
        raise ValueError(f"{path}: expected a recipe in {form}, got: {error}") from None


def _from_function(source: str) -> Recipe:
    module_name, _, name = source.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # like `python -m`, but unlike an installed command
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:
        raise ValueError(f"{source}: expected a module to import, got: {error}") from error
    build = getattr(module, name, None)
    if not callable(build):
        raise ValueError(f"{source}: expected a function {name!r} in {module_name}, got {build!r}")
    try:
        inspect.signature(build).bind()
    except TypeError as error:
        raise ValueError(f"{source}: expected a function without arguments, got: {error}") from None
    built = build()
    if not isinstance(built, Recipe):
        raise ValueError(f"{source}: expected a Recipe from {name}(), got {type(built).__name__}")
    return built
