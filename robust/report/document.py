"""A report as plain data, from which both HTML and PDF are rendered, so that they agree."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A small picture as PNG, with an alternative text."""

    png: bytes
    alt: str


Cell = str | Picture


@dataclass(frozen=True, kw_only=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Notice:
    """A highlighted paragraph; `kind` is ``warning``, ``note`` or ``good``."""

    kind: str
    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Highlights:
    """A few key numbers: value, label, and details."""

    items: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under a header of the same length; the first cell of each row names it."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        if any(len(row) != len(self.header) for row in self.rows):
            raise ValueError(f"expected rows of {len(self.header)} cells in {self.caption!r}")

    def is_numeric(self, column: int) -> bool:
        """Whether all cells of a column are numbers, or dashes for missing ones."""
        cells = [row[column] for row in self.rows]
        texts = [cell for cell in cells if isinstance(cell, str)]
        return len(texts) == len(cells) > 0 and all(map(_is_number, texts))


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot as SVG with an alternative text; its text and axes have the color `INK`."""

    caption: str
    alt: str
    svg: str


@dataclass(frozen=True, kw_only=True)
class Subsection:
    """A heading within a section."""

    title: str


Block = Text | Notice | Highlights | Table | Plot | Subsection

INK = "#010203"  # placeholder in SVG, which HTML replaces with the color of its text


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part with a heading."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True)
class Document:
    """The whole report; `subtitle` says in one line what it is about."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]


def _is_number(text: str) -> bool:
    plain = text.strip().lstrip("+−-").removesuffix("%").replace(",", "").replace(".", "", 1)
    return plain in ("", "–") or plain.replace("/", "", 1).isdigit() or _is_exponential(plain)


def _is_exponential(text: str) -> bool:
    mantissa, _, exponent = text.partition("e")
    return mantissa.isdigit() and exponent.lstrip("+-").isdigit()
