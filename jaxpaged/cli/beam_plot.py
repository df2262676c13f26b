"""One search as a picture: every beam that ever ran, from left to right, and which of them led to a result.

The only module that draws; matplotlib is an extra (`plots`), so nothing else imports this one before it is needed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.beam_snapshot import BeamSnapshot, FinishedBeam
from jaxpaged.cli.beam_tree import TextOf

#: With more ends than this the tokens of beams that led nowhere are left out.
MOST_LABELLED_ENDS = 70
BEST, RETURNED, LOST = "#d95f02", "#3b6fb6", "#b8b8b8"


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
    height: float = 0.0

    def add(self, child: PlottedBeam) -> PlottedBeam:
        child.parent = self
        self.children.append(child)
        return child


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


def rank_and_place(root: PlottedBeam, num_returned: int) -> int:
    """Rank what led to the `num_returned` best hypotheses, place the ends one below the other; how many ends."""
    ends = [node for node in all_nodes(root) if node.finished is not None]
    ends.sort(key=lambda node: -node.finished.score if node.finished else 0.0)
    for rank, end in enumerate(ends[:num_returned], start=1):
        node: PlottedBeam | None = end
        while node is not None and node.rank is None:
            node.rank = rank
            node = node.parent
    for node in all_nodes(root):
        node.children.sort(key=lambda child: (child.rank is None, child.rank or 0))
    nodes, num_ends = all_nodes(root), 0
    for node in nodes:
        if not node.children:
            node.height, num_ends = float(-num_ends), num_ends + 1
    for node in reversed(nodes):
        if node.children:
            # A beam goes on straight into its best child.
            node.height = node.children[0].height
    return num_ends


def plot_search(
    history: list[BeamSnapshot], params: BeamSearchParams, prompt: str, text_of: TextOf, path: Path
) -> None:
    root = build_nodes(history)
    num_ends = rank_and_place(root, params.num_returned)
    steps = history[-1].step
    figure = Figure(figsize=(min(5 + 0.75 * steps, 40), min(max(1.6 + 0.24 * num_ends, 3), 40)), layout="constrained")
    axes = figure.subplots()
    for node in all_nodes(root):
        _draw(axes, node, text_of, num_ends <= MOST_LABELLED_ENDS)
    axes.text(0, root.height, repr(prompt[-24:]) + " ", ha="right", va="center", fontsize=8, parse_math=False)
    axes.margins(x=0.12, y=0.04)
    axes.set_yticks([])
    axes.set_xlabel("generated tokens")
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.set_title(_title(history, params), fontsize=9)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a token may be a character that the font lacks
        figure.savefig(path, dpi=130)


def _draw(axes: Axes, node: PlottedBeam, text_of: TextOf, labels_all: bool) -> None:
    """The line from the parent, the token above it, and what a hypothesis came to."""
    if node.parent is None:
        return
    color = LOST if node.rank is None else BEST if node.rank == 1 else RETURNED
    order = 3 if node.rank == 1 else 2 if node.rank is not None else 1
    width = {1: 0.8, 2: 1.4, 3: 2.4}[order]
    start, end = node.parent, node
    corner = start.step + 0.25
    axes.plot(
        [start.step, corner, end.step], [start.height, end.height, end.height],
        color=color, linewidth=width, zorder=order, solid_capstyle="round",
    )  # fmt: skip
    if labels_all or node.rank is not None:
        text = text_of(node.token_ids[:-1], node.token_ids[-1:])
        token = repr(text)[1:-1] if text.strip(" ") else repr(text)
        middle = (corner + end.step) / 2
        axes.text(middle, end.height + 0.12, token, ha="center", va="bottom", fontsize=6.5, zorder=4, parse_math=False,
                  color="#777777" if node.rank is None else "black")  # fmt: skip
    if node.finished is not None:
        axes.plot([end.step], [end.height], marker="s", markersize=4, color=color, zorder=5)
        rank = "" if node.rank is None else f"#{node.rank}  "
        label = f"  {rank}{node.finished.score:.3f}  ({node.logprob:.2f})"
        axes.text(end.step, end.height, label, ha="left", va="center", fontsize=7, color=color, zorder=5)


def _title(history: list[BeamSnapshot], params: BeamSearchParams) -> str:
    output = history[-1].output
    title = f"{params.beam_width} beams; at each end score and (log-probability)"
    if output is None:
        return title
    kv = output.kv
    pages = (
        f"{kv.pages_at_peak} pages at the peak, {kv.logical_pages_at_peak} without sharing, {kv.pages_copied} copied"
    )
    return f"{title}\n{pages}"
