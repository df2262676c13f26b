"""One search as a picture: a row for each result in the order of their rank, and hanging from them what led nowhere.

The only module of a search that draws; matplotlib is an extra (`plots`), so nothing else imports this one before it is
needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.beam_snapshot import BeamSnapshot, FinishedBeam
from jaxpaged.cli.beam_tree import TextOf
from jaxpaged.looks import style
from jaxpaged.looks.palette import BEST, LOST, RETURNED
from jaxpaged.looks.whitespace import visible

#: Of the branches that led nowhere, so many are shown where they leave a row; the others are counted.
MOST_STUBS = 4
#: Rows apart: from a row to its first stub, from stub to stub, and from the last one to the next row.
TO_STUB, STUB, ROW = 0.55, 0.42, 1.0
#: Inches of a step and of a row.
STEP_WIDTH, ROW_HEIGHT = 0.85, 0.42
LARGEST = 40.0  # inches
LONGEST_LABEL = 11  # characters, as wide as a step
FINE = "#6B7280"


@dataclass(slots=True, eq=False)
class PlottedBeam:
    """A beam after some step, or a finished hypothesis."""

    step: int
    token_ids: list[int]  # of the beam
    logprob: float
    parent: PlottedBeam | None = None
    children: list[PlottedBeam] = field(default_factory=list)
    rank: int | None = None  # of the best hypothesis that it led to, from 1
    finished: FinishedBeam | None = None
    height: float = 0.0  # of what has a rank

    def add(self, child: PlottedBeam) -> PlottedBeam:
        child.parent = self
        self.children.append(child)
        return child

    @property
    def lost(self) -> list[PlottedBeam]:
        """Children that led to no result, those that lived longest first."""
        return sorted((child for child in self.children if child.rank is None), key=last_step, reverse=True)


def build_nodes(history: list[BeamSnapshot]) -> PlottedBeam:
    """The root of all beams of all groups. `history` has every step; what finished is as the last one knows it."""
    root = PlottedBeam(0, [], 0.0)
    for group in range(len(history[0].searches)):
        levels: list[list[PlottedBeam]] = [[root] * len(history[0].searches[group].running)]
        for snapshot in history:
            search = snapshot.searches[group]
            level = []
            for beam, parent in zip(search.running, search.parents, strict=True):
                node = PlottedBeam(snapshot.step, beam.token_ids, beam.cumulative_logprob)
                level.append((levels[-1][parent] if snapshot.step > 1 else root).add(node))
            levels.append(level)
        for finished in history[-1].searches[group].finished:
            before = len(finished.token_ids) - 1
            parent = levels[before][finished.parents[-1]] if before else root
            node = PlottedBeam(before + 1, finished.token_ids, finished.cumulative_logprob, finished=finished)
            parent.add(node)
    return root


def all_nodes(root: PlottedBeam) -> list[PlottedBeam]:
    """Parents before their children, each followed by all that comes of it."""
    found, waiting = [], [root]
    while waiting:
        node = waiting.pop()
        found.append(node)
        waiting += reversed(node.children)
    return found


def last_step(node: PlottedBeam) -> int:
    """The last step of what came of a beam."""
    return max(one.step for one in all_nodes(node))


def rank_and_place(root: PlottedBeam, num_returned: int) -> float:
    """Rank what led to the `num_returned` best hypotheses and place these, the best on top; returns the lowest height.

    A beam lies in the row of the best hypothesis that it led to.
    """
    ends = [node for node in all_nodes(root) if node.finished is not None]
    ends.sort(key=lambda node: -node.finished.score if node.finished else 0.0)
    for rank, end in enumerate(ends[:num_returned], start=1):
        node: PlottedBeam | None = end
        while node is not None and node.rank is None:
            node.rank = rank
            node = node.parent
    rows: dict[int, list[PlottedBeam]] = {}
    for node in all_nodes(root):
        rows.setdefault(node.rank or 0, []).append(node)
    height = 0.0
    for rank in sorted(rows.keys() - {0}):
        for node in rows[rank]:
            node.height = height
        most = max(len(shown_stubs(node)) for node in rows[rank])
        height -= ROW + (TO_STUB + STUB * (most - 1) if most else 0.0)
    return height


def shown_stubs(node: PlottedBeam) -> list[PlottedBeam | int]:
    """The lost children of a node, or the first of them and how many there are besides."""
    lost = node.lost
    return list(lost) if len(lost) <= MOST_STUBS else [*lost[: MOST_STUBS - 1], len(lost) - MOST_STUBS + 1]


def plot_search(
    history: list[BeamSnapshot], params: BeamSearchParams, prompt: str, text_of: TextOf, path: Path
) -> None:
    root = build_nodes(history)
    lowest = rank_and_place(root, params.num_returned)
    steps = history[-1].step

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for node in all_nodes(root):
            if node.rank is not None:
                _draw_row(axes, node, text_of)
                _draw_stubs(axes, node, text_of)
        shown = "…" * (len(prompt) > 24) + visible(prompt[-24:])
        axes.text(-0.08, root.height, shown, ha="right", va="center", fontsize=9, parse_math=False)
        axes.set(xlim=(-0.05, steps + 0.3), ylim=(lowest + 0.45, 0.9), yticks=[], xlabel="generated tokens")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=30, integer=True, min_n_ticks=1))
        axes.spines["left"].set_visible(False)
        axes.set_title(_title(history, params), fontsize=10.5, pad=10)
        style.legend_below(figure, axes, _legend())

    size = min(4.2 + STEP_WIDTH * steps, LARGEST), min(1.9 - ROW_HEIGHT * lowest, LARGEST)
    style.draw(path, size, paint, dpi=130)


def _draw_row(axes: Axes, node: PlottedBeam, text_of: TextOf) -> None:
    """The line from the parent, the token above it, and what a hypothesis came to."""
    if node.parent is None:
        return
    is_best = node.rank == 1
    color, order = (BEST, 4) if is_best else (RETURNED, 3)
    start, corner = node.parent, node.parent.step + 0.2
    axes.plot(
        [start.step, corner, node.step], [start.height, node.height, node.height],
        color=color, linewidth=2.6 if is_best else 1.5, zorder=order, solid_capstyle="round", solid_joinstyle="round",
    )  # fmt: skip
    _write(axes, (corner + node.step) / 2, node.height + 0.1, _token(node, text_of), "#16181D", 8, "center", "bottom")
    if node.finished is not None:
        axes.plot([node.step], [node.height], marker="s", markersize=4.5, color=color, zorder=6)
        label = f"#{node.rank}  {node.finished.score:.3f}  ({node.logprob:.2f})"
        # Beyond the last step there is room for the longest of these, wherever in the picture a hypothesis ended.
        _write(axes, node.step + 0.12, node.height, label, color, 8.5, "left", "center")


def _draw_stubs(axes: Axes, node: PlottedBeam, text_of: TextOf) -> None:
    """What left a row and led nowhere: the first token, and how many more it came to."""
    for place, stub in enumerate(shown_stubs(node)):
        height = node.height - TO_STUB - STUB * place
        axes.plot(
            [node.step + 0.04, node.step + 0.04, node.step + 0.12], [node.height, height, height],
            color=LOST, linewidth=0.9, zorder=1,
        )  # fmt: skip
        if isinstance(stub, int):
            label = f"{stub} more"
        else:
            further = last_step(stub) - stub.step
            label = visible(text_of(stub.token_ids[:-1], stub.token_ids[-1:]), LONGEST_LABEL - 3 * bool(further))
            label += f" +{further}" if further else ""
        _write(axes, node.step + 0.15, height, label, FINE, 7, "left", "center")


def _token(node: PlottedBeam, text_of: TextOf) -> str:
    return visible(text_of(node.token_ids[:-1], node.token_ids[-1:]), LONGEST_LABEL)


def _write(axes: Axes, x: float, y: float, text: str, color: str, size: float, ha: str, va: str) -> None:
    """Over whatever line crosses it."""
    axes.text(x, y, text, color=color, fontsize=size, ha=ha, va=va, zorder=5, parse_math=False, clip_on=False,
              bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85})  # fmt: skip


def _legend() -> list[Line2D]:
    return [
        Line2D([], [], color=BEST, linewidth=2.6, label="the best"),
        Line2D([], [], color=RETURNED, linewidth=1.5, label="returned"),
        Line2D([], [], color=LOST, linewidth=0.9, label="led nowhere: its first token, and how many followed"),
    ]


def _title(history: list[BeamSnapshot], params: BeamSearchParams) -> str:
    output = history[-1].output
    title = f"{params.beam_width} beams; at each end rank, score and (log-probability)"
    if output is None:
        return title
    kv = output.kv
    pages = (
        f"{kv.pages_at_peak} pages at the peak, {kv.logical_pages_at_peak} without sharing, {kv.pages_copied} copied"
    )
    return f"{title}\n{pages}"
