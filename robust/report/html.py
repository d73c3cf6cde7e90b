"""A report as one self-contained HTML file."""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Iterator
from html import escape

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

LONG = 40  # characters above which the text of a cell may wrap
STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1b1b1a; --soft: #5d5d58;
  --line: #d9d8d3; --band: #f3f2ee; --link: #005a91; --good: #00664a; --warn: #a23b00; }
@media (prefers-color-scheme: dark) { :root { --paper: #161615; --ink: #e8e7e2; --soft: #a9a8a1;
  --line: #3b3a37; --band: #21211f; --link: #6cbcf0; --good: #3fc795; --warn: #ff9a5c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 .6rem; padding-top: .7rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
p { margin: .6rem 0; max-width: 46rem; }
a { color: var(--link); }
.subtitle { color: var(--soft); margin: 0 0 1.2rem; overflow-wrap: anywhere; }
nav ol { columns: 18rem 2; margin: 0; padding-left: 1.4rem; color: var(--soft); }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; padding: 0; list-style: none; }
.cards li { flex: 1 1 11rem; border: 1px solid var(--line); border-radius: .5rem;
  padding: .8rem 1rem; background: var(--band); }
.cards b { display: block; font-size: 1.8rem; line-height: 1.15; }
.cards small { display: block; color: var(--soft); font-size: .8rem; }
.notice { border-left: .3rem solid var(--soft); background: var(--band); padding: .55rem .9rem;
  margin: .7rem 0; max-width: 46rem; }
.notice.warning { border-color: var(--warn); }
.notice.good { border-color: var(--good); }
.notice strong { display: block; }
.notice.warning strong { color: var(--warn); }
.notice.good strong { color: var(--good); }
figure { margin: 1.2rem 0; }
figure svg { display: block; width: 100%; min-width: 36rem; max-width: 50rem; height: auto;
  color: var(--ink); }
figcaption, caption { color: var(--soft); font-size: .85rem; text-align: left; padding: .2rem 0; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .84rem; line-height: 1.35; }
th, td { padding: .28rem .6rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: middle; white-space: nowrap; }
thead th { white-space: normal; border-bottom: 1.5px solid var(--soft); vertical-align: bottom; }
tbody th { font-weight: 500; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.long { overflow-wrap: anywhere; white-space: normal; min-width: 16rem; }
td img { display: block; width: 4.5rem; height: 4.5rem; image-rendering: pixelated; }
@media print { :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444;
  --line: #bbb; --band: #fff; --link: #000; --good: #00664a; --warn: #a23b00; }
  body { max-width: none; padding: 0; font-size: 9.5pt; } nav { display: none; }
  .scroll { overflow: visible; } figure svg { min-width: 0; } table { font-size: 7.5pt; }
  th, td { padding: .2rem .35rem; } td img { width: 16mm; height: 16mm; }
  h2, h3, caption { break-after: avoid; }
  figure svg, .notice { print-color-adjust: exact; }
  tr, .scroll, figure, .notice, .cards { break-inside: avoid; } }
@media print, (forced-colors: active) { .notice.warning { border-left: .45rem double; } }
@media (forced-colors: active) { figure svg { color: CanvasText; }
  .notice.good { border-left-color: Highlight; } }
"""


def render_html(document: Document) -> str:
    """The report as one page of valid HTML, with ordered headings, alt texts and table headers."""
    links = "".join(
        f'<li><a href="#{_anchor(section.title)}">{escape(section.title)}</a></li>'
        for section in document.sections
    )
    plots = itertools.count(1)
    sections = "\n".join(_section(section, plots) for section in document.sections)
    title = escape(document.title)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="subtitle">{escape(document.subtitle)}</p>
<nav aria-label="Contents"><ol>{links}</ol></nav>
</header>
<main>
{sections}
</main>
</body>
</html>
"""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", " ", page)  # control characters


def _section(section: Section, plots: Iterator[int]) -> str:
    anchor = _anchor(section.title)
    blocks = "\n".join(_block(block, plots) for block in section.blocks)
    return (
        f'<section aria-labelledby="{anchor}">\n'
        f'<h2 id="{anchor}">{escape(section.title)}</h2>\n{blocks}\n</section>'
    )


def _block(block: Block, plots: Iterator[int]) -> str:
    if isinstance(block, Text):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Subsection):
        return f"<h3>{escape(block.title)}</h3>"
    if isinstance(block, Notice):
        return (
            f'<div class="notice {block.kind}" role="note"><strong>{escape(block.title)}</strong> '
            f"{escape(block.text)}</div>"
        )
    if isinstance(block, Highlights):
        return _highlights(block)
    if isinstance(block, Table):
        return _table(block)
    return _plot(block, next(plots))


def _highlights(block: Highlights) -> str:
    items = "".join(
        f"<li><b>{escape(value)}</b>{escape(name)}<small>{escape(note)}</small></li>"
        for value, name, note in block.items
    )
    return f'<ul class="cards">{items}</ul>'


def _table(table: Table) -> str:
    numeric = [k > 0 and table.is_numeric(k) for k in range(len(table.header))]
    head = "".join(
        f'<th scope="col"{_class(number)}>{escape(name)}</th>'
        for name, number in zip(table.header, numeric, strict=True)
    )
    rows = "\n".join(f"<tr>{_row(row, numeric)}</tr>" for row in table.rows)
    # Focusable by keyboard, because it scrolls on narrow pages.
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(table.caption)}">'
        f"<table><caption>{escape(table.caption)}</caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def _row(row: tuple[Cell, ...], numeric: list[bool]) -> str:
    cells = []
    for k, (cell, number) in enumerate(zip(row, numeric, strict=True)):
        if not k:
            cells.append(f'<th scope="row">{_cell(cell)}</th>')
        else:
            long = isinstance(cell, str) and len(cell) > LONG
            cells.append(f"<td{_class(number, long=long)}>{_cell(cell)}</td>")
    return "".join(cells)


def _cell(cell: Cell) -> str:
    if isinstance(cell, Picture):
        data = base64.b64encode(cell.png).decode()
        return f'<img src="data:image/png;base64,{data}" alt="{escape(cell.alt)}">'
    return escape(cell)


def _class(number: bool, *, long: bool = False) -> str:
    name = "number" if number else "long" if long else ""
    return f' class="{name}"' if name else ""


def _plot(plot: Plot, number: int) -> str:
    svg = plot.svg.replace(INK, "currentColor")
    # Ids must be unique within the page.
    svg = re.sub(r'( id="|href="#|url\(#)i', rf"\1plot{number}-", svg)
    label = escape(plot.alt)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    caption = escape(plot.caption)
    # The figure scrolls on narrow pages.
    return (
        f'<figure><div class="scroll" tabindex="0" role="group" aria-label="{caption}">\n{svg}\n'
        f"</div><figcaption>{caption}</figcaption>\n</figure>"
    )


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
