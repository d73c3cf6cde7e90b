"""The error for models that can't be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A model can't be used: names it, what was expected and what was found."""

    def __init__(self, path: Path | str, expected: str, found: str) -> None:
        super().__init__(f"{path}: expected {expected}, found {found}")
        self.path, self.expected, self.found = str(path), expected, found

    def __reduce__(self) -> tuple[Any, ...]:  # it is sent between processes
        return type(self), (self.path, self.expected, self.found)


def of_model(path: Path | str, error: ValueError) -> CheckpointError:
    """An error such as ``expected a mean, got 3`` as one of the model at `path`."""
    expected, _, found = str(error).removeprefix("expected ").partition(", got ")
    return CheckpointError(path, expected, found or "another")


def reason(error: OSError) -> str:
    """The operating system's message, in lower case."""
    return (error.strerror or str(error) or type(error).__name__).lower()


def first_line(error: BaseException) -> str:
    """Up to 200 characters of the message's first line; the type of an error without message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
