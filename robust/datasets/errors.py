"""The error for data that can't be used."""

from functools import partial
from typing import Any


class DatasetError(ValueError):
    """Data that can't be used: names the source, what was expected and what was found."""

    def __init__(self, source: str, *, expected: str, found: str) -> None:
        super().__init__(f"{source}: expected {expected}, found {found}")
        self.source = source
        self.expected = expected
        self.found = found

    def __reduce__(self) -> tuple[Any, ...]:  # it is sent between processes
        return partial(type(self), expected=self.expected, found=self.found), (self.source,)


class TooManyToFit(DatasetError):
    """More images need resizing than the limit; raised before any is resized."""
