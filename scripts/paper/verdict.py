"""What a figure of ours is held to, and what comes of it: the words of every verdict.

reproduced   within what is allowed around the paper's figure, or within the range that the paper gives
beaten       outside of it, on the side that is better
not reached  outside of it, on the side that is worse
differs      outside of it, where neither side is better, or where ours and the paper's are not of like conditions
reached      an aim of our own is met; "not reached" otherwise
agrees       as another simulation has it; "differs" otherwise
"""

from __future__ import annotations

import math
from typing import NamedTuple

PAPER, AIM, SIMULATION = "paper", "aim", "simulation"
_INSIDE = {PAPER: "reproduced", AIM: "reached", SIMULATION: "agrees"}


class Held(NamedTuple):
    """The range to which a figure is held, whose it is, and which side of it is better, if one is."""

    low: float | None
    high: float | None
    why: str  # the paper's 1.3 and up to 10 % more
    whose: str = PAPER
    better: str | None = None  # "more" or "less"

    @property
    def range(self) -> str:
        if self.low is None:
            return f"at most {self.high:.4g}"
        return f"at least {self.low:.4g}" if self.high is None else f"{self.low:.4g} to {self.high:.4g}"

    def verdict(self, mean: float) -> str:
        if math.isnan(mean):
            return "not reached"
        is_below = self.low is not None and mean < self.low
        is_above = self.high is not None and mean > self.high
        if not is_below and not is_above:
            return _INSIDE[self.whose]
        if self.better is None:
            return "not reached" if self.whose == AIM else "differs"
        return "beaten" if is_above == (self.better == "more") else "not reached"


def near(paper: float, share: float = 0.0, points: float = 0.0, better: str | None = None, whose: str = PAPER) -> Held:
    """As the paper's figure, give or take a share of it, or so many points."""
    slack = points or share * paper
    allowed = f"{points:g}" if points else f"{share:.0%}".replace("%", " %")
    return Held(paper - slack, paper + slack, f"{_NAMES[whose]} {paper:g} ± {allowed}", whose, better)


def at_least(paper: float, share: float = 0.1, note: str = "") -> Held:
    """What the paper claims, or a little more: what is beyond that is beaten, and not the same figure."""
    return Held(paper, paper * (1 + share), f"{note or _NAMES[PAPER]} {paper:g} and up to {share * 100:.0f} % more",
                PAPER, "more")  # fmt: skip


def within(low: float | None, high: float | None, better: str | None = None, why: str = "the paper's range") -> Held:
    return Held(low, high, why, PAPER, better)


def aim(low: float | None = None, high: float | None = None) -> Held:
    return Held(low, high, "an aim of our own", AIM)


_NAMES = {PAPER: "the paper's", SIMULATION: "the other simulation's"}
