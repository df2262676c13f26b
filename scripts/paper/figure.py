"""What all figures of reproduce.py share: rows of ours beside the paper's with a verdict, tables and pictures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Row(NamedTuple):
    """One figure of ours beside the paper's, and what would count as the same."""

    what: str
    ours: list[float]  # one a seed
    paper: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def mean(self) -> float:
        return float(np.mean(self.ours))

    @property
    def verdict(self) -> str:
        if self.low is None and self.high is None:
            return ""
        is_in = (self.low is None or self.mean >= self.low) and (self.high is None or self.mean <= self.high)
        return "reproduced" if is_in else "not reproduced"


class Figure(NamedTuple):
    title: str
    method: str
    rows: list[Row]
    draw: Callable[[Any], None]  # onto matplotlib axes


def table(figure: Figure, num_seeds: int) -> Iterator[str]:
    yield f"{figure.title}\n{figure.method}; {num_seeds} seeds\n"
    width = max(len(row.what) for row in figure.rows)
    yield f"{'':{width}}     ours      sd    paper"
    for row in figure.rows:
        paper = "" if row.paper is None else f"{row.paper:.2f}"
        yield f"{row.what:{width}} {row.mean:8.2f} {np.std(row.ours):7.2f} {paper:>8}  {row.verdict}".rstrip()
    yield ""


def check_plotting(parser: argparse.ArgumentParser, directory: Path) -> None:
    if not directory.is_dir():
        parser.error(f"--plot {directory}: no such directory")
    try:
        import matplotlib
    except ImportError:
        parser.error("--plot needs matplotlib: pip install 'jaxpaged[plots]'")
    matplotlib.use("agg")


def plot(figure: Figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    canvas, axes = plt.subplots(figsize=(8, 4.5))
    figure.draw(axes)
    axes.set_title(figure.title, pad=24)
    canvas.tight_layout()
    canvas.savefig(path, dpi=80)
    plt.close(canvas)
