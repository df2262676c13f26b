"""Swapping: a preempted group's pages leave the pool for host memory whole, and come back to other pages of the pool.

The device sees only ids: which pages to gather when a group goes, into which to scatter them when it returns. Here are
the books: block tables are turned into places in what was taken out and back into page ids, so that every page moves
once, however many sequences share it, and all of them share it again afterwards. A group goes and comes as a whole, so
what swap space holds of it is told by the group alone. Full pages of a prefix that the whole run shares (pinned pages)
stay where they are: the group lets go of them, and shares them again when it returns.

Whether to swap or to compute again is a question of cost, asked for each group (`is_swap_cheaper`).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from jaxpaged.config import PreemptionConfig
from jaxpaged.host.pages.block_table import BlockTable, release
from jaxpaged.host.pages.page_allocator import PageAllocator
from jaxpaged.host.pages.token_tree import num_tokens_to_compute, plan_placements
from jaxpaged.host.sequence import SequenceGroup


class Swap(NamedTuple):
    """Take a group's pages out of the pool, or bring those that were taken out back; before anything is written."""

    group: SequenceGroup
    page_ids: list[int]  # of the pool: gathered or scattered in this order
    is_out: bool


class SwapSpace:
    """How much of the host memory for swapped pages is taken, and by whom."""

    def __init__(self, config: PreemptionConfig):
        self.config = config
        self.num_pages = config.swap_pages if config.can_swap else 0
        self.num_free = self.num_pages
        self.pinned_pages: Sequence[int] = ()  # with which the table of every sequence begins, in every group
        self._num_pages: dict[SequenceGroup, int] = {}

    def holds(self, group: SequenceGroup) -> bool:
        return group in self._num_pages

    def num_pages_of(self, group: SequenceGroup) -> int:
        """Pages that a swapped group needs to come back."""
        return self._num_pages[group]

    def wants(self, group: SequenceGroup, page_size: int) -> bool:
        """Whether a group that must give way should be swapped, if there is room for it."""
        if not self.config.can_swap:
            return False
        return self.config.mode == "swap" or is_swap_cheaper(group, page_size, self.config.page_cost)

    def has_room_for(self, group: SequenceGroup) -> bool:
        tables = [sequence.table for sequence in group.unfinished]
        return len(_moved_pages(tables, len(self.pinned_pages))) <= self.num_free

    def take_out(self, group: SequenceGroup, allocator: PageAllocator) -> Swap:
        """Free the group's pages; there must be room for it."""
        page_ids = unload([sequence.table for sequence in group.unfinished], allocator, len(self.pinned_pages))
        self.num_free -= len(page_ids)
        assert self.num_free >= 0, "a group was swapped out that swap space has no room for"
        self._num_pages[group] = len(page_ids)
        return Swap(group, page_ids, is_out=True)

    def bring_back(self, group: SequenceGroup, allocator: PageAllocator) -> Swap:
        """Give the group as many pages as were taken from it; so many must be free."""
        page_ids = load([sequence.table for sequence in group.unfinished], allocator, self.pinned_pages)
        self.num_free += self._num_pages.pop(group)
        return Swap(group, page_ids, is_out=False)


def is_swap_cheaper(group: SequenceGroup, page_size: int, page_cost: float) -> bool:
    """Whether moving the group's pages out and back takes no longer than computing its tokens again.

    Both ways keep the sharing: a page that several samples or beams share is moved once, and its tokens are computed
    once. So both costs are sums over what the group holds. Moving costs by the page, full or not: `page_cost`, in
    tokens that could be computed in the time that one page takes both ways. Computing costs by the token, at whatever
    page size. So large pages that are part-filled speak for computing, full ones for moving; and which models swap is
    settled by how much arithmetic a token takes for each byte of its keys and values (preemption.py has the numbers).

    The paper has a simpler rule, one sequence is computed again and several are swapped, because its recomputation
    cannot rebuild what a group shares. Ours can: the number of sequences itself decides nothing here.
    """
    num_pinned = group.prefix_len // page_size  # neither moved nor computed again
    num_pages = len(_moved_pages([sequence.table for sequence in group.unfinished], num_pinned))
    return num_pages * page_cost <= num_tokens_to_compute(plan_placements(group, page_size))


def unload(tables: Sequence[BlockTable], allocator: PageAllocator, num_pinned: int = 0) -> list[int]:
    """Let go of all pages; the ids of the pages that are to be moved, each once.

    The tables then name places, not pages: the first `num_pinned` are the pages with which all tables begin, which
    others hold and which stay; behind them are those that are moved, in order. What was gone stays so.
    """
    page_ids = _moved_pages(tables, num_pinned)
    places = {page_id: place for place, page_id in enumerate(page_ids, num_pinned)}
    for table in reversed(tables):
        names = [places[page_id] if i >= num_pinned else i for i, page_id in enumerate(table.held, table.num_gone)]
        swapped, num_slots, gone = table.pages[: table.num_gone] + array("i", names), table.num_slots, table.num_gone
        release(table, allocator)
        table.pages, table.num_slots, table.num_gone = swapped, num_slots, gone
    return page_ids


def load(tables: Sequence[BlockTable], allocator: PageAllocator, pinned: Sequence[int] = ()) -> list[int]:
    """Take a page for each place that the tables name, shared as the place is; the ids of the pages, place by place.

    The first places are `pinned` pages that are there already, and are not among the ids.
    """
    places = sorted(_moved_pages(tables, len(pinned)))
    page_ids = dict(enumerate(pinned)) | {place: allocator.allocate() for place in places}
    held = set(range(len(pinned)))
    for table in tables:
        for i, place in enumerate(table.held, table.num_gone):
            page_id = table.pages[i] = page_ids[place]
            if place in held:
                allocator.share(page_id)
            held.add(place)
    return [page_ids[place] for place in places]


def _moved_pages(tables: Sequence[BlockTable], num_pinned: int) -> list[int]:
    """All that the tables hold behind the pinned pages, each once."""
    starts = [max(table.num_gone, num_pinned) for table in tables]
    pairs = zip(tables, starts, strict=True)
    return list(dict.fromkeys(page_id for table, start in pairs for page_id in table.pages[start:]))
