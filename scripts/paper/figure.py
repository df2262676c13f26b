"""What all figures of reproduce.py share: rows of ours beside the paper's with a verdict, tables and pictures."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from verdict import Held

#: Inches of a picture.
SIZE = (9.5, 4.8)


class Row(NamedTuple):
    """One figure of ours, what it stands beside, and what it is held to."""

    what: str
    ours: list[float]  # one a seed
    paper: float | None = None
    held: Held | None = None

    @property
    def mean(self) -> float:
        return float(np.mean(self.ours))

    @property
    def verdict(self) -> str:
        return "" if self.held is None else self.held.verdict(self.mean)

    @property
    def off(self) -> float | None:
        """How far ours is from the paper's, as a share of it."""
        return None if not self.paper else self.mean / self.paper - 1


class Figure(NamedTuple):
    title: str
    method: str
    rows: list[Row]
    draw: Callable[[Any], None]  # onto a matplotlib figure
    replayed_on: str = ""  # the device whose step times the runs took, where they are replays
    beside: str = "paper"  # what ours is compared with

    @property
    def full_title(self) -> str:
        return f"{self.title} (a replay with step times of {self.replayed_on})" if self.replayed_on else self.title


def table(figure: Figure, num_seeds: int) -> Iterator[str]:
    yield figure.full_title
    yield textwrap.fill(f"{figure.method}; {num_seeds} seeds", 120) + "\n"
    width = max(len(row.what) for row in figure.rows)
    beside = max(8, len(figure.beside))
    yield f"{'':{width}}     ours      sd {figure.beside:>{beside}}     off  verdict"
    for row in figure.rows:
        paper = "" if row.paper is None else f"{row.paper:.2f}"
        off = "" if row.off is None else f"{row.off:+.0%}"
        figures = f"{row.what:{width}} {row.mean:8.2f} {np.std(row.ours):7.2f} {paper:>{beside}} {off:>7}"
        yield f"{figures}  {verdict_words(row, figure)}".rstrip()
    yield ""


def verdict_words(row: Row, figure: Figure) -> str:
    if row.held is None:
        return ""
    replay = " in replay" if figure.replayed_on else ""
    return f"{row.verdict}{replay}, held to {row.held.range} ({row.held.why})"


def check_plotting(parser: argparse.ArgumentParser, directory: Path) -> None:
    if not directory.is_dir():
        parser.error(f"--plot {directory}: no such directory")
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        parser.error("--plot needs matplotlib: pip install 'jaxpaged[plots]'")


def plot(figure: Figure, path: Path) -> None:
    from jaxpaged.looks import style

    style.draw(path, SIZE, lambda canvas: paint(figure, canvas))


def paint(figure: Figure, canvas: Any) -> None:
    figure.draw(canvas)
    canvas.suptitle(figure.title, x=0.01, ha="left", fontsize=12.5)
    if figure.replayed_on:
        canvas.text(0.99, 0.985, f"replay with step times of {figure.replayed_on}", ha="right", va="top",
                    fontsize=9.5, color="#5D6470")  # fmt: skip


def bars_beside_paper(
    axes: Any, names: list[str], ours: list[float], paper: list[float | None], colours: list[str]
) -> None:
    """Ours as bars, each with its figure; the paper's as a line across each bar that it has one for."""
    from jaxpaged.looks.palette import PAPER

    places = np.arange(len(names))
    bars = axes.bar(places, ours, width=0.62, color=colours, label="ours")
    known = [(place, value) for place, value in zip(places, paper, strict=True) if value is not None]
    axes.hlines([v for _, v in known], [p - 0.4 for p, _ in known], [p + 0.4 for p, _ in known],
                color=PAPER.colour, linewidth=2, label=f"the {PAPER.word}'s")  # fmt: skip
    axes.bar_label(bars, [f"{value:.3g}" for value in ours], padding=3, fontsize=9.5)
    axes.set_xticks(places, names)
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)
