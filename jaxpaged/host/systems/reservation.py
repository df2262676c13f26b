"""How a system keeps KV memory: the one thing in which the scheduler's paged cache and its baselines differ.

The scheduler asks its policy for memory and gives memory back; queues, prefill, decode and preemption are the same for
all. `Paged` takes pages as they are needed and shares them. `Contiguous` gives every sequence one chunk of consecutive
pages when its request is admitted, sized for a length that was guessed: the systems before paging, as the vLLM paper
rebuilt them (Kwon et al. 2023, section 6.1, "Orca"). Block tables name the pages of a chunk one after the other, so
kernels, batches and the engine know nothing of it.

Other ways to keep KV answer the same questions (roles.py): dense rows and static batches (dense_rows.py), and no cache
at all (no_cache.py).
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from jaxpaged.config import CacheConfig
from jaxpaged.host.pages.block_table import (
    BlockTable,
    PageCopy,
    append_slots,
    fork,
    num_pages_for,
    refork,
    release,
    truncate,
)
from jaxpaged.host.pages.page_allocator import PageAllocator
from jaxpaged.host.pages.token_tree import SequencePlacement, num_pages_of
from jaxpaged.host.pages.window import PageWindow
from jaxpaged.host.sequence import SequenceGroup
from jaxpaged.host.systems.roles import LeavesAtOnce
from jaxpaged.step_io import NULL_PAGE


class Paged(LeavesAtOnce):
    """Pages as they are needed, shared by reference count."""

    shares_pages = True
    hindsight = None

    def __init__(self, cache: CacheConfig, allocator: PageAllocator, window: PageWindow | None = None):
        self.page_size = cache.page_size
        self.window = window
        self.num_usable_pages = cache.num_usable_pages
        self.allocator = allocator
        self._prefix = BlockTable()
        self._copies: list[PageCopy] = []

    def check(self, prompt_len: int, num_samples: int, max_len: int, prefix_len: int = 0) -> None:
        needed = most_pages(prompt_len, num_samples, max_len, self.page_size, prefix_len)
        if self.window is not None and num_samples == 1 and not prefix_len:
            needed = min(needed, self.window.least_pages)
        if needed > self.num_usable_pages:
            raise ValueError(
                f"{prompt_in_words(prompt_len, prefix_len)} with {num_samples} sample(s) of up to "
                f"{max_len - prompt_len} tokens needs {needed} pages of {self.page_size} tokens, "
                f"the pool has {self.num_usable_pages}: raise num_pages, or lower max_tokens or n"
            )

    def try_place(self, group: SequenceGroup, placements: list[SequencePlacement], headroom: Callable[[], int]) -> bool:
        found = {page_id for one in placements for page_id in one.found if page_id != NULL_PAGE}
        num_resting = sum(not self.allocator.ref_count(page_id) for page_id in found)
        num_new = num_pages_of(placements, self.page_size)
        window = self.window if len(placements) == 1 else None  # of several, some begin where others have been
        if window is not None:
            num_new = min(num_new, window.most_pages)
        needed, free = num_new + num_resting, self.allocator.num_free
        if needed > free or needed + headroom() > free:  # the headroom takes a look at every running sequence
            return False
        for sequence, _, _, found in placements:  # all, before any other page is taken in their place
            if found:
                sequence.table = self._table_of(found)
        for i, (sequence, num_shared, num_to_compute, found) in enumerate(placements):
            if num_shared and not found:
                parent = self._prefix if num_shared == group.prefix_len else placements[i - 1].sequence.table
                sequence.table = fork(parent, self.allocator)
                truncate(sequence.table, num_shared, self.allocator)
            if window is not None:
                num_to_compute = window.num_first_slots(num_shared, num_to_compute)
            copies = append_slots([sequence.table], [num_to_compute], self.allocator)
            group.pages.copied += len(copies)
            self._copies += copies
        return True

    def place_prefix(self, num_tokens: int, found: Sequence[int]) -> BlockTable:
        """Pages for the prefix that all groups of the run share, those that were found and others behind them; the pool
        is empty, and has room (`check`)."""
        self._prefix = self._table_of(found)
        append_slots([self._prefix], [num_tokens - self._prefix.num_slots], self.allocator)
        return self._prefix

    def _table_of(self, found: Sequence[int]) -> BlockTable:
        table = BlockTable(array("i", found), len(found) * self.page_size, num_gone=found.count(NULL_PAGE))
        self.allocator.share_found(table.held)
        return table

    def fork(self, table: BlockTable) -> BlockTable:
        return fork(table, self.allocator)

    def refork(self, table: BlockTable, parent: BlockTable) -> tuple[int, int]:
        return refork(table, parent, self.allocator)

    def append(self, tables: list[BlockTable], counts: list[int]) -> list[PageCopy]:
        return append_slots(tables, counts, self.allocator)

    def release(self, table: BlockTable) -> int:
        return release(table, self.allocator)

    def settle(self, group: SequenceGroup) -> None:
        """Nothing is left over: pages went back one by one."""

    def take_copies(self) -> list[PageCopy]:
        copies, self._copies = self._copies, []
        return copies

    @property
    def requested_slots(self) -> int:
        return self.allocator.num_used * self.page_size

    def check_invariants(self, tables: Iterable[BlockTable]) -> None:
        """Counts equal table entries, free and held pages partition the pool, no known page is part-filled."""
        self.allocator.check_invariants()
        held: Counter[int] = Counter()
        for table in tables:
            held.update(table.held)
            assert table.pages[: table.num_gone].count(NULL_PAGE) == table.num_gone, "what is gone is named"
            if table.num_slots % self.page_size:
                assert table.pages[-1] not in self.allocator.known.hashes, f"page {table.pages[-1]} is not full"
        for page_id in range(1, self.allocator.num_pages):
            assert self.allocator.ref_count(page_id) == held[page_id], f"page {page_id} is miscounted"


def most_pages(prompt_len: int, num_samples: int, max_len: int, page_size: int, prefix_len: int = 0) -> int:
    """Pages of a group whose samples all reach `max_len`; the KV of a last token is never written.

    With those of the prefix that the run shares: the full ones are the group's too, a part-filled one is not.
    """
    shared = prompt_len // page_size
    own = num_samples * (num_pages_for(max(max_len - 1, prompt_len), page_size) - shared)
    return shared + own + (prefix_len % page_size > 0)


def prompt_in_words(prompt_len: int, prefix_len: int) -> str:
    """For errors."""
    return f"prompt of {prompt_len} tokens" + (f" ({prefix_len} of them the shared prefix)" if prefix_len else "")
