"""How results are shown at the terminal and written to files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click


def plain(text: str) -> str:
    """`text` without line breaks or control characters: names come from files of others."""
    return "".join(char if char.isprintable() else " " for char in text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], table_format: str = "text") -> str:
    """A table as ``text``, columns aligned by padding, as ``markdown`` or as ``latex``."""
    if table_format == "latex":
        return _latex(header, rows)
    if table_format == "markdown":
        return _markdown(header, rows)
    return _text(header, rows)


def _text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns whose cells are all numbers stand to the right."""
    cells = [[plain(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [
        all(cell.replace(".", "", 1).isdigit() for cell in column[1:])
        for column in zip(*cells, strict=True)
    ]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    )


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    escaped = [[plain(cell).strip().replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _latex(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """With the rules of booktabs."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(_escape_latex(plain(cell).strip()) for cell in cells) + r" \\"

    columns = "l" + "r" * (len(header) - 1)
    body = [line(header), r"\midrule", *map(line, rows)]
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}"]
    )


def _escape_latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


def percent(share: float) -> str:
    """A share as ``12.3%``."""
    return f"{100 * share:.1f}%"


def write_report(path: Path, value: Any) -> None:
    """Write `value` as JSON to a file, atomically, or to standard output for ``-``."""
    from robust.files import to_json, write_json

    if str(path) == "-":
        click.echo(to_json(value), nl=False)
    elif path.exists() and not path.is_file():  # a pipe or device: nothing to rename over
        path.write_bytes(to_json(value))
    else:
        write_json(path.resolve(), value)


class Progress:
    """A bar on a terminal; elsewhere a plain line for each tenth of the work. Nothing if quiet."""

    def __init__(self, total: int, *, title: str, unit: str, quiet: bool = False) -> None:
        self.total, self.title, self.unit, self.quiet = total, title, unit, quiet
        self.done, self.tenths = 0, 0
        self.bar: Any = None
        if sys.stderr.isatty() and not quiet:
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=title, unit=unit, leave=False)

    def update(self, done: int, note: str) -> None:
        """Show that `done` of the total are through, with `note` on the state so far."""
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(done - self.done)
        elif done * 10 // self.total > self.tenths and not self.quiet:
            self.tenths = done * 10 // self.total
            share = f"{done}%" if self.unit == "%" else f"{done}/{self.total} {self.unit}"
            click.echo(f"{self.title}: {share}, {note}", err=True)
        self.done = done

    def tick(self) -> None:
        """Show that work goes on, though nothing is through."""
        if self.bar is not None:
            self.bar.refresh()

    def close(self) -> None:
        """Take the bar off the screen."""
        if self.bar is not None:
            self.bar.close()
