"""Checks the fields of nested dataclasses against their annotations."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Limits:
    """Allowed range of a number, the ends included unless `above` or `below` says otherwise."""

    low: float
    high: float = math.inf
    above: bool = False  # low itself is not allowed
    below: bool = False  # high itself is not allowed

    def allow(self, value: float) -> bool:
        """Whether `value` is in the range."""
        over = value > self.low if self.above else value >= self.low
        return over and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"more than {self.low:g}" if self.above else f"of at least {self.low:g}"
        brackets = "(" if self.above else "[", ")" if self.below else "]"
        return f"in {brackets[0]}{self.low:g}, {self.high:g}{brackets[1]}"


class _SizeMark:
    """Marks a size in pixel units, which may be written as text such as ``8/255``."""


Size = Annotated[float, Limits(0), _SizeMark()]
"""A size in pixel units. A file and ``--set`` may write it as ``8/255``."""


def hints(kind: type[Any]) -> dict[str, Any]:
    """The annotations of a dataclass by field, including the extras of `Annotated`."""
    return get_type_hints(kind, include_extras=True)


def unwrap(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """The bare type of an annotation, and the extras of `Annotated`."""
    if get_origin(hint) is Annotated:
        bare, *extras = get_args(hint)
        return bare, tuple(extras)
    return hint, ()


def is_size(hint: Any) -> bool:
    """Whether the annotation is `Size`."""
    return any(isinstance(extra, _SizeMark) for extra in unwrap(hint)[1])


def check_fields(value: Any, path: str = "") -> None:
    """Raise ValueError for a field that its annotation does not allow, also in nested dataclasses.

    The message is ``PATH: expected ..., got ...``. An item is identified in the path by its name
    or, without a name, by its index.
    """
    for name, hint in hints(type(value)).items():
        _check(getattr(value, name), hint, f"{path}.{name}".lstrip("."))


def _check(value: Any, hint: Any, path: str) -> None:
    bare, extras = unwrap(hint)
    if get_origin(bare) is tuple:
        _check_tuple(value, get_args(bare), path)
        return
    if is_dataclass(bare):
        if not isinstance(value, bare):  # type: ignore[arg-type]
            raise ValueError(f"{path}: expected {bare.__name__}, got {value!r}"[:300])  # type: ignore[union-attr]
        check_fields(value, path)
        return
    limits = next((extra for extra in extras if isinstance(extra, Limits)), None)
    if not _has_type(value, bare) or not (limits is None or limits.allow(value)):
        expected = " ".join(filter(None, (_in_words(bare), str(limits or ""))))
        raise ValueError(f"{path}: expected {expected}, got {value!r}"[:300])


def _check_tuple(value: Any, items: tuple[Any, ...], path: str) -> None:
    same = len(items) == 2 and items[1] is Ellipsis
    if not isinstance(value, tuple) or not (same or len(value) == len(items)):
        expected = "a list" if same else f"{len(items)} numbers"
        raise ValueError(f"{path}: expected {expected}, got {value!r}"[:300])
    for index, item in enumerate(value):
        name = getattr(item, "name", None)
        _check(item, items[0], name if isinstance(name, str) and name else f"{path}.{index}")


def _has_type(value: Any, bare: Any) -> bool:
    if get_origin(bare) is Literal:
        return value in get_args(bare)
    if bare is float:
        number = isinstance(value, int | float) and type(value) is not bool
        return number and abs(value) <= sys.float_info.max
    if bare is int:
        return isinstance(value, int) and type(value) is not bool
    return isinstance(value, bare)


def _in_words(bare: Any) -> str:
    if get_origin(bare) is Literal:
        choices = get_args(bare)
        return f"one of {', '.join(map(str, choices))}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[bare]
