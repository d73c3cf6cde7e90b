"""Tables as text, Markdown or LaTeX."""

from __future__ import annotations

from collections.abc import Sequence


def plain(text: str) -> str:
    """`text` without line breaks and control characters, which names from files may have."""
    return "".join(char if char.isprintable() else " " for char in text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], table_format: str = "text") -> str:
    """A table as ``text``, columns aligned by padding, as ``markdown`` or as ``latex``."""
    if table_format == "latex":
        return _latex(header, rows)
    if table_format == "markdown":
        return _markdown(header, rows)
    return _text(header, rows)


def _text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table with padded columns; columns of numbers are right-aligned."""
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
    """The table in LaTeX, with the rules of booktabs."""

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
