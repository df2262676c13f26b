"""The pictures of the paper's figures, from few requests: what they show, and that nothing covers anything."""

from __future__ import annotations

import memory as paper_memory
import pytest
from figure import SIZE, paint
from figure_checks import painted
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from jaxpaged.looks.palette import PARTS, SYSTEMS

FIGURES = {
    "2": paper_memory.figure_2, "13": paper_memory.figure_13, "15": paper_memory.figure_15,
    "18b": paper_memory.figure_18b,
}  # fmt: skip


@pytest.fixture(scope="module")
def figures():
    return {name: make(range(1), 64) for name, make in FIGURES.items()}


@pytest.fixture(scope="module")
def pictures(figures):
    return {name: painted(SIZE, lambda canvas, one=one: paint(one, canvas)) for name, one in figures.items()}


def bars(axes):
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def test_figure_2_has_the_parts_in_the_colours_of_compare_and_of_the_page(pictures):
    (axes,) = pictures["2"].axes
    parts = [look for part, look in PARTS.items() if part != "cached"]  # of lengths alone no page is known
    assert [text.get_text() for text in pictures["2"].legends[0].get_texts()] == [look.word for look in parts]
    assert {to_hex(bar.get_facecolor()).upper() for bar in bars(axes)} == {look.colour for look in parts}


def test_bars_of_figure_13_begin_at_0_on_an_axis_that_is_not_logarithmic(pictures):
    for axes in pictures["13"].axes:
        assert axes.get_yscale() == "linear" and axes.get_ylim()[0] == 0
        assert to_hex(bars(axes)[-1].get_facecolor()).upper() == SYSTEMS["paged"].colour


def test_figure_15_is_of_paging_alone_and_in_its_colour(pictures):
    (axes,) = pictures["15"].axes
    assert {to_hex(bar.get_facecolor()).upper() for bar in bars(axes)} == {SYSTEMS["paged"].colour}


def test_a_line_for_each_kind_of_lengths(pictures):
    assert [text.get_text() for text in pictures["18b"].legends[0].get_texts()] == [
        "sharegpt-like lengths", "alpaca-like lengths",
    ]  # fmt: skip
