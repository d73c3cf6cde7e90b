"""Draws plots with matplotlib, as deterministic SVG.

The colors are Okabe and Ito's, which color-blind readers can distinguish; line styles and markers
differ as well, for gray prints. Text and axes have the color `INK`; the background is transparent.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from threading import Lock
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from robust.report.document import INK
from robust.tables import plain

BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY, GRAY = "#CC79A7", "#56B4E9", "#808080"
# Color, marker and dashes of the first, second, ... series.
STYLES: tuple[tuple[str, str, Any], ...] = (
    (BLUE, "o", "-"),
    (VERMILION, "s", (0, (5, 2))),
    (GREEN, "^", (0, (2, 1.5))),
    (PURPLE, "D", (0, (6, 2, 1, 2))),
    (ORANGE, "v", (0, (1, 1))),
    (SKY, "P", "-"),
)
WIDTH = 6.9  # inches: the text of an A4 page
MAX_ANNOTATED = 12  # classes up to which a confusion matrix shows its numbers

_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor")
_PARAMETERS: Any = {
    "svg.fonttype": "path",
    "font.family": ["DejaVu Sans"],
    "font.size": 8.0,
    "text.parse_math": False,  # names of classes may have dollars
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.0,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRAY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    **dict.fromkeys((*_INKED, "xtick.color", "ytick.color"), INK),
}
_lock = Lock()  # matplotlib's settings are global


@dataclass(frozen=True, kw_only=True)
class Series:
    """The points of one line or set of markers, with optional intervals."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...] = ()
    joined: bool = True


def render(draw: Callable[[Figure], None], *, height: float, square: bool = False) -> str:
    """The SVG element of a figure that `draw` fills, `height` inches high.

    With `square`, panels keep their aspect ratio, which needs another layout.
    """
    settings: Any = {**mpl.rcParamsDefault, **_PARAMETERS}
    settings.pop("backend", None)  # setting it would load the backend
    with _lock, mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # missing glyphs are drawn as boxes
        layout: Any = "compressed" if square else "constrained"
        figure = Figure(figsize=(WIDTH, height), layout=layout)
        draw(figure)
        buffer = io.BytesIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue().decode()
    return _number_ids(text[text.index("<svg") :].strip())


def _number_ids(svg: str) -> str:
    """`svg` with consecutive instead of random ids, and without ids that nothing refers to."""
    numbers: dict[str, str] = {}
    for name in re.findall(r'(?:href="#|url\(#)([^")]+)', svg):
        numbers.setdefault(name, f"i{len(numbers)}")
    svg = re.sub(
        r' id="([^"]+)"', lambda m: f' id="{numbers[m[1]]}"' if m[1] in numbers else "", svg
    )
    return re.sub(r'(href="#|url\(#)([^")]+)', lambda m: m[1] + numbers[m[2]], svg)


def learning_curves(epochs: Sequence[dict[str, Any]], *, kept: int | None) -> str:
    """Accuracies above, loss and learning rate below; dotted lines separate the phases."""

    def draw(figure: Figure) -> None:
        panels: dict[str, Axes] = figure.subplot_mosaic(
            [["accuracy", "accuracy"], ["loss", "rate"]], height_ratios=(3, 2)
        )
        accuracy, loss, rate = (panels[name] for name in ("accuracy", "loss", "rate"))
        names = {"clean": "clean", "fgsm": "FGSM", "pgd": "PGD-10"}
        for (name, label), style in zip(names.items(), STYLES, strict=False):
            _line(accuracy, epochs, name, label=label, style=style, factor=100)
        _line(loss, epochs, "loss", label="loss", style=STYLES[0])
        _line(rate, epochs, "learning_rate", label="learning rate", style=STYLES[0])
        accuracy.set(title="Accuracy on held-out images, %", ylim=(0, 100))
        loss.set(title="Training loss")
        rate.set(title="Learning rate at the end of the epoch")
        for axes in panels.values():
            _phases(axes, epochs, named=axes is accuracy)
            axes.set_xlabel("epoch")
            axes.set_xlim(0.5, epochs[-1]["epoch"] + 0.5)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if kept is not None:
            accuracy.axvline(kept, color=INK, linewidth=0.8, alpha=0.6)
            accuracy.annotate(
                "kept ",
                (kept, 0),
                xytext=(0, 4),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="right",
            )
        accuracy.legend(ncols=3, loc="upper right", bbox_to_anchor=(1, 1.18))

    return render(draw, height=3.7)


def _line(
    axes: Axes,
    epochs: Sequence[dict[str, Any]],
    name: str,
    *,
    label: str,
    style: tuple[str, str, Any],
    factor: float = 1,
) -> None:
    color, marker, dashes = style
    values = [row.get(name) for row in epochs]
    y = [factor * float(value) if isinstance(value, int | float) else np.nan for value in values]
    x = [row["epoch"] for row in epochs]
    every = max(1, len(x) // 25)
    axes.plot(x, y, color=color, marker=marker, linestyle=dashes, label=label, markevery=every)


def _phases(axes: Axes, epochs: Sequence[dict[str, Any]], *, named: bool) -> None:
    starts = [
        row
        for k, row in enumerate(epochs)
        if not k or row.get("phase") != epochs[k - 1].get("phase")
    ]
    for k, row in enumerate(starts):
        if k:
            axes.axvline(row["epoch"] - 0.5, color=INK, linewidth=0.8, linestyle=":")
        if named:
            axes.annotate(
                f"{row.get('phase', '')} phase",
                (row["epoch"] - 0.5, 1),
                xytext=(4, -10),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
            )


def accuracy_against_eps(
    series: Sequence[Series], *, ticks: dict[float, str], chance: float, norm: str
) -> str:
    """Accuracy in percent against eps on a log2 scale, which is linear below the first tick."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        shift = 0.0  # so that markers at the same eps don't overlap
        for item, (color, marker, dashes) in zip(series, cycle(STYLES), strict=False):
            shift += 0 if item.joined else 0.07
            y = 100 * np.array(item.y)
            errors = 100 * np.abs(np.array(item.intervals).T - np.array(item.y))
            axes.errorbar(
                [eps * (1 if item.joined else 1 + shift) for eps in item.x],
                y,
                yerr=errors,
                color=color,
                marker=marker,
                linestyle=dashes if item.joined else "none",
                capsize=2.5,
                elinewidth=0.9,
                markersize=4 if item.joined else 6,
                markerfacecolor=color if item.joined else "none",
                label=item.label,
            )
        axes.axhline(100 * chance, color=GRAY, linewidth=0.9, linestyle=(0, (1, 2)))
        axes.annotate(
            "chance ",
            (1, 100 * chance),
            xytext=(0, 2),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            color=GRAY,
        )
        smallest = min((eps for eps in ticks if eps > 0), default=1.0)
        axes.set_xscale("symlog", base=2, linthresh=smallest)
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.minorticks_off()
        axes.set(ylim=(0, 100), xlabel=f"eps ({norm})", title="Accuracy, %, with 95% intervals")
        axes.set_xlim(-smallest / 4, max(ticks) * 1.2 or 1.0)
        axes.legend(loc="upper right")

    return render(draw, height=3.1)


def accuracy_by_class(
    classes: Sequence[str], accuracies: Sequence[tuple[str, Sequence[float | None]]]
) -> str:
    """Bars for each class, one for each label of `accuracies`."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        centers, width = np.arange(len(classes)), 0.8 / max(1, len(accuracies))
        for k, (label, shares) in enumerate(accuracies):
            heights = [100 * share if share is not None else 0 for share in shares]
            at = centers + (k - (len(accuracies) - 1) / 2) * width
            color = (BLUE, SKY, GREEN, ORANGE)[k % 4]  # dark and light in turn, for gray prints
            axes.bar(
                at,
                heights,
                width * 0.92,
                color=color,
                label=label,
                edgecolor=INK,
                linewidth=0.4,
            )
        rotation = 0 if len(classes) <= MAX_ANNOTATED else 90
        axes.set_xticks(centers, [_short(name) for name in classes], rotation=rotation)
        axes.tick_params(axis="x", length=0)
        axes.grid(visible=False, axis="x")
        axes.set(ylim=(0, 100), title="Accuracy by class, %")
        axes.legend(ncols=len(accuracies), loc="upper right", bbox_to_anchor=(1, 1.2))

    return render(draw, height=2.1)


def confusions(
    classes: Sequence[str], matrices: Sequence[tuple[str, Sequence[Sequence[int]]]]
) -> str:
    """For each class (row) the percentage predicted as each class (column); darker is more."""
    annotated = len(classes) <= MAX_ANNOTATED

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(matrices), squeeze=False, sharey=True)[0]
        for axes, (label, counts) in zip(panels, matrices, strict=True):
            table = np.array(counts, dtype=float)
            shares = 100 * table / np.maximum(table.sum(axis=1, keepdims=True), 1)
            axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=100)
            axes.set(title=label, ylim=(len(classes), 0), aspect="equal")
            axes.grid(visible=False)
            if len(classes) <= 30:
                middle = np.arange(len(classes)) + 0.5
                names = [_short(name) for name in classes]
                axes.set_xticks(middle, names, rotation=90)
                axes.set_yticks(middle, names)
            axes.tick_params(length=0)
            if annotated:
                _write_numbers(axes, shares)

    return render(draw, square=True, height=3.6 if len(matrices) > 1 else 4.5)


def _write_numbers(axes: Axes, shares: Any) -> None:
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.5:
            color = "#ffffff" if share > 55 else "#111111"
            axes.text(
                column + 0.5,
                row + 0.55,
                f"{share:.0f}",
                ha="center",
                va="center",
                fontsize=6,
                color=color,
            )


def loss_surfaces(titles: Sequence[str], grids: Sequence[Any], margins: Sequence[Any]) -> str:
    """The loss (S, S) around each image, with a line where the margin (S, S) crosses 0.

    Rows go along the random direction, columns along the gradient, both from -eps to eps.
    """

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(grids), squeeze=False, sharey=True)[0]
        steps = np.linspace(-1, 1, len(grids[0]))
        top = max(float(np.max(grid)) for grid in grids)
        levels = np.linspace(0, max(top, 1e-6), 25)
        filled = None
        for axes, title, grid, margin in zip(panels, titles, grids, margins, strict=True):
            filled = axes.contourf(steps, steps, grid, levels=levels, cmap="cividis")
            filled.set(edgecolor="face", linewidth=0.4)  # or viewers leave gaps between levels
            if float(np.min(margin)) < 0 < float(np.max(margin)):
                for color, width in (("#000000", 2.6), ("#ffffff", 1.3)):
                    axes.contour(steps, steps, margin, levels=[0.0], colors=color, linewidths=width)
            for color, width in (("#000000", 2.6), ("#ffffff", 1.3)):
                axes.plot(0, 0, marker="+", color=color, markersize=8, markeredgewidth=width)
            axes.set(title=plain(title), xlabel="along the gradient", aspect="equal")
            axes.set(xticks=[-1, 0, 1], yticks=[-1, 0, 1])
            axes.grid(visible=False)
        panels[0].set_ylabel("at random")
        assert filled is not None
        bar = figure.colorbar(filled, ax=list(panels), aspect=14, ticks=MaxNLocator(5))
        bar.set_label("cross-entropy")

    return render(draw, square=True, height=2.1 if len(grids) > 2 else 2.8)


def _short(name: str) -> str:
    name = plain(name)
    return name if len(name) <= 14 else f"{name[:13]}…"
