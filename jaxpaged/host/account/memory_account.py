"""Where every token slot of the pool is: used, reserved, lost inside or outside of what sequences hold, or free.

A run takes down a few integers a step; the account is made of them afterwards, because two of its parts are only known
in hindsight. The terms are those of the vLLM paper (Kwon et al. 2023, section 3.1 and Figure 2), the unit is a token
slot, and for every step

    used + reserved + internal + rounding + cached + free = pages of the pool * page_size

    used      positions that block tables cover when the step is planned: a prompt from its admission on, a generated
              token from the step on that computes its keys and values. A slot that several sequences share counts once.
              Where every layer has a window, a position counts until the step that does not reach its page any more
    reserved  positions that those who hold them will fill later, as it turned out
    internal  the rest of what was asked for, which nobody will ever fill; of pages, the unfilled end of last pages; of
              a static batch, also all that its ended sequences still hold
    rounding  what the allocator gave beyond what was asked for: pages and powers of two
    cached    pages that nobody holds, but that are known by their tokens: whoever needs room gets them too
    free      the rest

The last token of a request has its slot in `reserved`, as in the paper, though its keys and values are never written.
Paging asks for nothing ahead, so its `reserved` and `rounding` are 0. External fragmentation has two readings:
"external and others" of the paper's figure is `rounding + cached + free`; gaps between allocations, in the strict
sense, are `stranded`: what is cached or free while a request waits that finds no room.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CATEGORIES = ("used", "reserved", "internal", "rounding", "cached", "free")


@dataclass(frozen=True)
class MemoryAccount:
    """Arrays i64[steps]: token slots, unless said otherwise."""

    num_slots: int  # of the pool
    used: np.ndarray
    reserved: np.ndarray
    internal: np.ndarray
    rounding: np.ndarray
    cached: np.ndarray
    free: np.ndarray
    stranded: np.ndarray  # cached or free while the request at the head of the queue finds no room, else 0
    gaps: np.ndarray  # cached or free, but not in the largest free piece; pages can be anywhere, so for paging 0
    logical_pages: np.ndarray  # entries of block tables: a page that three samples share counts three times
    physical_pages: np.ndarray  # pages that these entries name, and those of a prefix that the run shares
    copied_pages: np.ndarray  # before the step
    swapped_out_pages: np.ndarray
    swapped_in_pages: np.ndarray

    @property
    def external(self) -> np.ndarray:
        """External fragmentation and others, as the paper's Figure 2 has it."""
        return self.rounding + self.cached + self.free

    @property
    def saving(self) -> np.ndarray:
        """Share of the pages without sharing that sharing saves, f64[steps]; 0 while no sequence runs.

        Below 0 where a shared prefix has too few requests to be worth its pages.
        """
        logical, physical = self.logical_pages, self.physical_pages
        return np.where(logical > 0, 1 - physical / np.maximum(logical, 1), 0.0)

    @property
    def mean_saving(self) -> float:
        """What the mean number of tables that hold a page saves: 1 - 1 / mean(logical / physical), as in Figure 15."""
        holds = self.logical_pages > 0
        if not holds.any():
            return 0.0
        return float(1 - 1 / (self.logical_pages[holds] / self.physical_pages[holds]).mean())

    def shares(self, steps: slice | np.ndarray = slice(None)) -> dict[str, float]:
        """Mean share of the pool in each category over `steps`, every step the same weight."""
        return {name: float(getattr(self, name)[steps].mean() / self.num_slots) for name in CATEGORIES}

    def columns(self) -> dict[str, np.ndarray]:
        """Every array, by name, for a table of steps."""
        names = [name for name in self.__dataclass_fields__ if name != "num_slots"]
        return {name: getattr(self, name) for name in names}


def make_account(
    series: dict[str, np.ndarray], num_pages: int, page_size: int, final: np.ndarray | None
) -> MemoryAccount:
    """From what was taken down a step (`RunStats`), and `final` i64[steps]: slots that will have been filled by those
    who hold memory at a step, or None where nothing is held for later."""
    used, held = series["used_slots"], series["pages_used"] * page_size
    is_reserved = final is not None
    final = final if is_reserved else used
    unheld, cached = num_pages * page_size - held, series["cached_pages"] * page_size
    return MemoryAccount(
        num_slots=num_pages * page_size,
        used=used,
        reserved=final - used,
        internal=series["requested_slots"] - final,
        rounding=held - series["requested_slots"],
        cached=cached,
        free=unheld - cached,
        stranded=np.where(series["is_short"] > 0, unheld, 0),
        gaps=unheld - series["largest_free"] * page_size,
        logical_pages=series["logical_pages"],
        physical_pages=series["logical_pages"] if is_reserved else series["pages_used"],  # chunks share nothing
        copied_pages=series["copied_pages"],
        swapped_out_pages=series["swapped_out_pages"],
        swapped_in_pages=series["swapped_in_pages"],
    )
