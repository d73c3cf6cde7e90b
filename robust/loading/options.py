"""Options for the properties that a model's file does not contain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from robust.choices import CIFAR10, CIFAR100, IMAGENET, Rgb

_NAMED = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "imagenet": IMAGENET,
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
}
NAMED_MEANS: dict[str, Rgb] = {name: mean for name, (mean, _) in _NAMED.items()}
NAMED_STDS: dict[str, Rgb] = {name: std for name, (_, std) in _NAMED.items()}


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Properties given by the user; those that are None are read from the file or guessed."""

    arch: str | None = None
    """A name, ``name:variant``, ``timm:NAME`` or ``torchvision:NAME``."""
    stem: str | None = None
    activation: str | None = None
    input_size: int | None = None
    """Height and width in pixels."""
    mean: Rgb | None = None
    """Subtracted from pixels in [0, 1]."""
    std: Rgb | None = None
    """Divides them."""
    classes: tuple[str, ...] | None = None
    """Names in the order of the logits."""
    key: str | None = None
    """The entry of the file with the weights, such as ``ema`` or, nested, ``state.ema``."""

    def given(self) -> dict[str, object]:
        """The fields that are set."""
        return {name: value for name, value in vars(self).items() if value is not None}


def model_options(
    *,
    arch: str | None = None,
    stem: str | None = None,
    activation: str | None = None,
    input_size: int | None = None,
    mean: str | float | Sequence[float] | None = None,
    std: str | float | Sequence[float] | None = None,
    classes: str | Sequence[str] | None = None,
    key: str | None = None,
) -> ModelOptions:
    """Parse the options as the user writes them. Raises ValueError and OSError."""
    if not isinstance(key, str | None):
        raise ValueError(f"expected key as text, got {key!r}")
    if input_size is not None and type(input_size) is not int:
        raise ValueError(f"expected input_size as a whole number, got {input_size!r}")
    return ModelOptions(
        arch=arch,
        stem=stem,
        activation=activation,
        input_size=input_size,
        mean=None if mean is None else parse_rgb(mean, NAMED_MEANS),
        std=None if std is None else parse_rgb(std, NAMED_STDS),
        classes=None if classes is None else parse_classes(classes),
        key=key,
    )


def parse_rgb(text: str | float | Sequence[float], named: dict[str, Rgb]) -> Rgb:
    """Three comma-separated numbers, one number for all channels, or a name such as ``imagenet``.

    Raises ValueError, also for values that are meant for pixels from 0 to 255.
    """
    if isinstance(text, str) and text.strip().lower() in named:
        return named[text.strip().lower()]
    parts = text.split(",") if isinstance(text, str) else text
    try:
        numbers = [float(part) for part in ([parts] if isinstance(parts, int | float) else parts)]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        numbers *= 3
    if len(numbers) != 3:
        raise ValueError(f"expected 3 numbers or one of {', '.join(named)}, got {text!r}")
    check_unit_pixels(numbers)
    return numbers[0], numbers[1], numbers[2]


def check_unit_pixels(values: Sequence[float]) -> None:
    """Raise ValueError for a mean or std that is meant for pixels from 0 to 255."""
    if any(abs(value) > 10 for value in values):
        shown = ", ".join(f"{value:g}" for value in values)
        raise ValueError(f"expected a mean and std of pixels in [0, 1], got {shown}: divide by 255")


def parse_classes(text: str | Sequence[str]) -> tuple[str, ...]:
    """Comma-separated names, or a text file with one per line. Raises ValueError and OSError."""
    if not isinstance(text, Sequence) or not all(isinstance(part, str) for part in text):
        raise ValueError(f"expected class names as text, got {text!r}")
    where = ""
    if not isinstance(text, str):
        parts = list(text)
    elif _is_file(text):
        where, parts = f"{text}: ", _lines(Path(text))
    else:
        parts = text.split(",")
    names = tuple(part.strip() for part in parts if part.strip())
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise ValueError(
            f"{where}expected different class names, got {', '.join(repeated[:5])} twice"
        )
    return names


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected class names in UTF-8, got {error.reason}") from None


def _is_file(text: str) -> bool:
    """Whether `text` is the path of a file; a list of names may be too long for one."""
    try:
        return Path(text).is_file()
    except OSError:
        return False
