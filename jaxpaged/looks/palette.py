"""Words and colours: what a thing is called, and how it is coloured, wherever it is drawn.

The colours are Okabe and Ito's where there are enough of them: they stay apart in print and for the colour-blind. In
one figure no two things share one; the parts of a pool and the systems that keep it are never in one legend.
"""

from __future__ import annotations

from typing import NamedTuple


class Look(NamedTuple):
    word: str
    colour: str  # on white
    dark: str = ""  # on black, where a page has a dark side


#: Where the token slots of a pool are (host/account/memory_account.py), in the order in which they are stacked. What is
#: external in Figure 2 of the vLLM paper, "and others", is the last three together.
PARTS = {
    "used": Look("token states", "#009E73", "#12946f"),
    "reserved": Look("reservation", "#56B4E9", "#3a86b4"),
    "internal": Look("internal fragmentation", "#E69F00", "#c08400"),
    "rounding": Look("external fragmentation", "#CC79A7", "#a75c87"),
    "cached": Look("cached", "#A9D8C8", "#2f6552"),
    "free": Look("free", "#E6E8EC", "#2a2e36"),
}
#: Token states that several block tables hold, where a figure tells them apart.
SHARED = Look("token states, shared", "#00614A", "#7fdcc0")

#: Ways to keep KV memory (config.KV_CACHES), by the names that an engine takes.
SYSTEMS = {
    "paged": Look("paged", "#0072B2"),
    "contiguous-oracle": Look("contiguous-oracle", "#D55E00"),
    "contiguous-pow2": Look("contiguous-pow2", "#E69F00"),
    "contiguous-max": Look("contiguous-max", "#CC79A7"),
    "dense": Look("dense", "#009E73"),
    "dense-static": Look("dense-static", "#56B4E9"),
    "dense-static-global": Look("dense-static-global", "#7A5C3E"),
    "none": Look("none", "#555555"),
}
#: The same with the names of the vLLM paper, for figures that stand beside the paper's.
PAPER_NAMES = {
    "paged": "paged", "contiguous-oracle": "Orca (Oracle)", "contiguous-pow2": "Orca (Pow2)",
    "contiguous-max": "Orca (Max)", "dense-static": "static",
}  # fmt: skip
#: A marker for each system, since a line is not known by its colour alone.
MARKERS = dict(zip(SYSTEMS, "osD^vPX*", strict=True))

#: Whatever stands for the paper beside ours.
PAPER = Look("paper", "#222222")
#: Colours for things that are no systems: lengths, batches, measures.
OTHERS = ("#4C5FD5", "#B5651D", "#3C8D93", "#8A4F9E")
#: Beams: the best, the other ones that are returned, and those that led nowhere.
BEST, RETURNED, LOST = "#D55E00", "#0072B2", "#B4B8BE"
