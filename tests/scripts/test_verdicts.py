"""What a figure is held to is printed beside its verdict, and a figure far above the paper's is not called the same."""

from __future__ import annotations

import pytest
from figure import Figure, Row, table
from verdict import SIMULATION, aim, at_least, near, within


@pytest.mark.parametrize(
    "held, ours, verdict",
    [
        (near(10.0, share=0.05), 10.4, "reproduced"),
        (near(10.0, share=0.05), 13.9, "differs"),  # 39 % above
        (near(10.0, share=0.05), 9.0, "differs"),
        (near(96.3, points=1.5, better="more"), 98.0, "beaten"),
        (near(96.3, points=1.5, better="more"), 90.0, "not reached"),
        (at_least(1.3), 1.35, "reproduced"),
        (at_least(1.3), 1.8, "beaten"),
        (at_least(1.3), 1.29, "not reached"),
        (within(20.0, 26.0, better="less"), 4.0, "beaten"),
        (within(20.0, 26.0, better="less"), 30.0, "not reached"),
        (within(None, 1.2), 1.3, "differs"),
        (aim(97.0), 96.6, "not reached"),
        (aim(97.0), 97.4, "reached"),
        (aim(high=5.0), 9.0, "not reached"),
        (near(96.0, points=1.5, whose=SIMULATION), 96.3, "agrees"),
        (near(96.0, points=1.5, whose=SIMULATION), 99.0, "differs"),
        (at_least(1.3), float("nan"), "not reached"),  # no run came so far
    ],
)
def test_a_verdict_is_of_the_range_and_of_its_better_side(held, ours, verdict):
    assert held.verdict(ours) == verdict


def test_a_verdict_is_of_the_mean_and_none_where_nothing_is_held():
    assert Row("", [1.0, 2.0], 1.5, near(1.5, share=0.01)).verdict == "reproduced"
    assert Row("", [1.0], paper=3.0).verdict == "" and Row("", [1.0], paper=4.0).off == -0.75


def test_the_table_says_how_far_off_a_figure_is_what_it_is_held_to_and_that_it_is_a_replay():
    rows = [Row("rate", [13.9], 10.0, near(10.0, share=0.05)), Row("other", [1.0], None, aim(2.0)), Row("more", [1.0])]
    lines = list(table(Figure("Figure 0", "method", rows, lambda canvas: None), num_seeds=1))
    assert lines[2].split() == ["ours", "sd", "paper", "off", "verdict"]
    assert lines[3].endswith("13.90    0.00    10.00    +39%  differs, held to 9.5 to 10.5 (the paper's 10 ± 5 %)")
    assert lines[4].endswith("not reached, held to at least 2 (an aim of our own)")
    assert lines[5].split() == ["more", "1.00", "0.00"]
    replay = list(table(Figure("Figure 0", "method", rows, lambda canvas: None, "a device"), num_seeds=1))
    assert replay[0] == "Figure 0 (a replay with step times of a device)"
    assert "differs in replay, held to 9.5 to 10.5" in replay[3]
