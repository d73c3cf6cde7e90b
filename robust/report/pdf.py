"""Renders a report as PDF, with vector plots, by fpdf2."""

from __future__ import annotations

import io
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import matplotlib as mpl
from fpdf import FPDF
from fpdf.enums import TableBordersLayout, WrapMode, XPos, YPos
from fpdf.fonts import FontFace
from fpdf.util import Padding

from robust.report.document import (
    INK,
    Block,
    Cell,
    Document,
    Highlights,
    Notice,
    Picture,
    Plot,
    Section,
    Subsection,
    Table,
    Text,
)
from robust.tables import plain

FONT = "DejaVu Sans"  # part of matplotlib; has Latin, Greek, Cyrillic and more
MARGIN = 18.0  # mm
BODY, SMALL, TINY = 9.0, 7.5, 6.5  # points
SOFT, LINE = (90, 90, 86), (200, 200, 196)
COLORS = {"warning": (162, 59, 0), "good": (0, 102, 74), "note": SOFT}
PICTURE = 15.0  # mm
HEADING = 22.0  # mm above which a column heading may wrap
POINT = 25.4 / 72  # mm
PADDING = (0.7, 1.2)  # mm in a table cell: above and below, left and right
FIRST_ROWS = 4  # rows of a long table on the page of its heading
MAX_ROWS = 40  # rows of a table that may be kept on one page


def render_pdf(document: Document) -> bytes:
    """The report as A4 pages with bookmarks; equal documents give equal bytes."""
    pdf = _Pages(document)
    for section in document.sections:
        pdf.section(section)
    return bytes(pdf.output())


class _Pages(FPDF):
    """Lays out blocks one below the other, and keeps headings with what follows them."""

    def __init__(self, document: Document) -> None:
        super().__init__(format="A4", unit="mm")
        fonts = Path(mpl.get_data_path()) / "fonts" / "ttf"
        self.add_font(FONT, "", fonts / "DejaVuSans.ttf")
        self.add_font(FONT, "B", fonts / "DejaVuSans-Bold.ttf")
        self.set_creation_date(datetime(2000, 1, 1, tzinfo=UTC))  # fixed, for equal bytes
        self.set_title(document.title)
        self.set_lang("en")
        self.running_title = document.title
        self.set_margins(MARGIN, MARGIN, MARGIN)
        self.set_auto_page_break(True, margin=MARGIN + 4)
        self.set_draw_color(*LINE)
        self.add_page()
        self._write(document.title, 17, bold=True, after=0.5)
        self._write(document.subtitle, SMALL, color=SOFT, after=2)

    def footer(self) -> None:
        """Title and page number."""
        self.set_y(-MARGIN + 4)
        self._font(TINY, color=SOFT)
        half = self.epw / 2
        self.cell(half, 4, plain(self.running_title))
        self.cell(half, 4, str(self.page_no()), align="R")

    def section(self, section: Section) -> None:
        """A section with its heading and bookmark."""
        self._ensure_room(17 + self._opening_height(section.blocks))
        if self.y > self.t_margin + 1:
            self.ln(5)
            self.line(self.l_margin, self.y, self.l_margin + self.epw, self.y)
            self.ln(2.5)
        self.start_section(section.title)
        self._write(section.title, 13, bold=True, after=1.5)
        for k, block in enumerate(section.blocks):
            if isinstance(block, Subsection):
                self._ensure_room(10 + self._opening_height(section.blocks[k + 1 :]))
            self._block(block)

    def _opening_height(self, blocks: Sequence[Block]) -> float:
        """Height in mm of the first blocks, up to and including the first that is not text."""
        height = 0.0
        for block in blocks:
            height += self._height(block)
            if not isinstance(block, Text | Subsection):
                break
        return height

    def _height(self, block: Block) -> float:
        """Approximate height of a block in mm; for a long table, of its first rows."""
        if isinstance(block, Plot):
            width, height = _size(block.svg)
            return height * min(1.0, self.epw / width) + 8
        if isinstance(block, Table):
            return self._table_height(block)
        return 4 + 5 * (len(block.text) // 100 + 1) if isinstance(block, Text) else 18.0

    def _table_height(self, table: Table) -> float:
        """Height of caption, header and rows in mm; for a long table, of its first rows."""
        size, widths = self._table_layout(table)
        pictures = _has_pictures(table)
        considered = table.rows[: FIRST_ROWS if len(table.rows) > MAX_ROWS else None]
        first = 6 + self._row_height(table.header, size, widths, bold=True)
        heights = [self._row_height(row, size, widths) for row in considered]
        whole = first + sum(heights)
        if len(considered) == len(table.rows) and whole < (0.9 if pictures else 0.4) * self.eph:
            return whole
        lead = first + sum(heights[:FIRST_ROWS])
        return lead if lead < 0.6 * self.eph else first + heights[0]

    def _row_height(
        self, row: Sequence[Cell], size: float, widths: Sequence[float], *, bold: bool = False
    ) -> float:
        """Height of a row in mm: that of its tallest cell, with padding."""
        self._font(size, bold=bold)
        heights = []
        for cell, width in zip(row, widths, strict=True):
            if isinstance(cell, Picture):
                heights.append(PICTURE)
                continue
            text = _truncate(cell) if bold else plain(cell)
            line = size * POINT * 1.3
            vertical, horizontal = PADDING
            padding = Padding(vertical, horizontal, vertical, horizontal)
            lines = self.multi_cell(
                width, line, text, dry_run=True, output="LINES", padding=padding
            )
            assert isinstance(lines, list)
            heights.append(max(1, len(lines)) * line)
        return max(heights) + 2 * PADDING[0]

    def _table_layout(self, table: Table) -> tuple[float, list[float]]:
        """The font size in points and the column widths in mm."""
        widths = self._widths(table, SMALL)
        if sum(widths) <= self.epw:
            return SMALL, widths
        return TINY, _narrow(self._widths(table, TINY), self.epw)

    def _block(self, block: Block) -> None:
        if isinstance(block, Text):
            self._write(block.text, BODY, after=2)
        elif isinstance(block, Subsection):
            self.ln(2)
            self._write(block.title, 10.5, bold=True, after=1)
        elif isinstance(block, Notice):
            self._notice(block)
        elif isinstance(block, Highlights):
            self._highlights(block)
        elif isinstance(block, Table):
            self._table(block)
        else:
            self._plot(block)

    def _notice(self, block: Notice) -> None:
        self._ensure_room(18)
        color, top, page = COLORS[block.kind], self.y, self.page
        self.set_left_margin(MARGIN + 4)
        self._write(block.title, BODY, bold=True, color=color)
        self._write(block.text, BODY)
        self.set_left_margin(MARGIN)
        if self.page == page:
            with self.local_context(draw_color=color, line_width=0.9):
                self.line(MARGIN + 1, top + 0.5, MARGIN + 1, self.y - 0.5)
        self.ln(2)

    def _highlights(self, block: Highlights) -> None:
        columns = min(4, len(block.items))
        width = self.epw / columns
        for start in range(0, len(block.items), columns):
            self._ensure_room(22)
            top, lowest = self.y, self.y
            for k, (value, name, note) in enumerate(block.items[start : start + columns]):
                self.set_left_margin(MARGIN + k * width)
                self.set_xy(MARGIN + k * width, top)
                self._write(value, 17, bold=True, width=width - 3)
                self._write(name, BODY, width=width - 3)
                self._write(note, TINY, color=SOFT, width=width - 3)
                lowest = max(lowest, self.y)
            self.set_left_margin(MARGIN)
            self.set_xy(MARGIN, lowest)
            self.ln(2.5)

    def _plot(self, plot: Plot) -> None:
        self._ensure_room(self._height(plot))
        width, height = _size(plot.svg)
        scale = min(1.0, self.epw / width)
        # Black, because fpdf2 draws some colors as black anyway.
        data = io.BytesIO(plot.svg.replace(INK, "#000000").encode())
        self.image(data, w=width * scale, h=height * scale, alt_text=plot.alt)
        self._write(plot.caption, SMALL, color=SOFT, after=3)

    def _table(self, table: Table) -> None:
        size, widths = self._table_layout(table)
        self._ensure_room(self._height(table))
        self._write(table.caption, SMALL, color=SOFT, after=0.5)
        self._font(size)
        aligns = tuple(
            "RIGHT" if k and table.is_numeric(k) else "LEFT" for k in range(len(table.header))
        )
        with self.table(
            width=sum(widths),
            col_widths=widths,
            align="LEFT",
            text_align=aligns,
            borders_layout=TableBordersLayout.HORIZONTAL_LINES,
            headings_style=FontFace(emphasis="BOLD"),
            line_height=size * POINT * 1.3,
            padding=PADDING,
            wrapmode=WrapMode.WORD,
        ) as rendered:
            rendered.row([_truncate(name) for name in table.header])
            for row in table.rows:
                line = rendered.row()
                for cell in row:
                    if isinstance(cell, Picture):
                        line.cell(img=io.BytesIO(cell.png), img_fill_width=True)
                    else:
                        line.cell(plain(cell))
        self.ln(3.5)

    def _widths(self, table: Table, size: float) -> list[float]:
        """The width that each column needs, in mm."""
        widths = []
        for k, name in enumerate(table.header):
            self._font(size, bold=True)
            # A long heading may wrap between words.
            whole = self.get_string_width(name)
            words = [self.get_string_width(word) for word in name.split()]
            needed = [whole] if whole < HEADING else words
            self._font(size)
            needed += [self._cell_width(row[k]) for row in table.rows]
            widths.append(max(needed) + 2.8)
        return widths

    def _cell_width(self, cell: Cell) -> float:
        return PICTURE if isinstance(cell, Picture) else float(self.get_string_width(plain(cell)))

    def _ensure_room(self, height: float) -> None:
        """Start a new page unless `height` mm are left on this one, or it is empty."""
        if self.will_page_break(height) and self.y > self.t_margin + 1:
            self.add_page()

    def _font(self, size: float, *, bold: bool = False, color: Sequence[int] = (0, 0, 0)) -> None:
        self.set_font(FONT, "B" if bold else "", size)
        self.set_text_color(*color)

    def _write(
        self,
        text: str,
        size: float,
        *,
        bold: bool = False,
        color: Sequence[int] = (0, 0, 0),
        width: float = 0,
        after: float = 0,
    ) -> None:
        self._font(size, bold=bold, color=color)
        self.multi_cell(
            width, size * POINT * 1.4, plain(text), align="L", new_x=XPos.LMARGIN, new_y=YPos.NEXT
        )
        self.ln(after)


def _size(svg: str) -> tuple[float, float]:
    """Width and height of an SVG element in mm."""
    head = svg[: svg.index(">")]
    width, height = (
        float(head.split(f' {name}="')[1].split("pt")[0]) for name in ("width", "height")
    )
    return width * POINT, height * POINT


def _narrow(widths: Sequence[float], room: float) -> list[float]:
    """The widths reduced to fit `room`: the widest columns shrink, as their text can wrap."""
    low, high = 0.0, max(widths)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(min(w, middle) for w in widths) > room else (middle, high)
    return [min(width, low) for width in widths]


def _has_pictures(table: Table) -> bool:
    return any(isinstance(cell, Picture) for row in table.rows for cell in row)


def _truncate(name: str) -> str:
    name = plain(name)
    return name if len(name) <= 40 else f"{name[:39]}…"
