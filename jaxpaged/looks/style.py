"""The matplotlib style of every figure. matplotlib is an extra (`plots`), so nothing imports this before it draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DPI = 110
#: The width in inches of a figure that stands alone in a page of documentation or on a slide.
WIDTH = 9.5
STYLE: dict[Any, Any] = {
    "font.size": 11, "axes.titlesize": 12.5, "axes.labelsize": 11, "legend.fontsize": 10.5, "figure.labelsize": 11,
    "xtick.labelsize": 10.5, "ytick.labelsize": 10.5, "axes.titlelocation": "left", "axes.titlepad": 8.0,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": False, "axes.axisbelow": True,
    "grid.color": "#DDE1E6", "grid.linewidth": 0.8, "lines.linewidth": 1.8, "lines.markersize": 5.5,
    "legend.frameon": False, "legend.columnspacing": 1.6, "figure.facecolor": "white", "axes.edgecolor": "#555B65",
    "text.color": "#16181D", "axes.labelcolor": "#16181D", "xtick.color": "#3A3F47", "ytick.color": "#3A3F47",
}  # fmt: skip


def draw(path: Path, size: tuple[float, float], paint: Callable[[Figure], None], dpi: int = DPI) -> None:
    """Write what `paint` draws onto a figure of `size` inches, without a display."""
    with warnings.catch_warnings(), matplotlib.rc_context(STYLE):
        warnings.filterwarnings("ignore", message="Glyph")  # a token may be a character that the font lacks
        make(size, paint).savefig(path, dpi=dpi)


def make(size: tuple[float, float], paint: Callable[[Figure], None]) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure)
        return figure


def legend_below(figure: Figure, axes: Axes, handles: Sequence[Any] | None = None, most_columns: int = 6) -> None:
    """Below all axes, where no line and no text is; as many rows as its names need."""
    if handles is None:
        handles = axes.get_legend_handles_labels()[0]
    names = [str(handle.get_label()) for handle in handles]
    # About 12 characters an inch; the colour and the gap to the next one are as wide as 8.
    room = 12 * figure.get_figwidth()
    is_one_row = sum(map(len, names)) + 8 * len(names) <= room and len(names) <= most_columns
    columns = len(names) if is_one_row else max(1, min(most_columns, int(room / (max(map(len, names)) + 8))))
    figure.legend(handles, names, loc="outside lower center", ncols=min(columns, len(names)))


def grid(axes: Axes, axis: str = "y") -> None:
    axes.grid(axis=axis)  # pyright: ignore[reportArgumentType]
