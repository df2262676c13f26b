"""How a system keeps KV memory: the one thing in which the scheduler's paged cache and its baselines differ.

The scheduler asks its policy for memory and gives memory back; queues, prefill, decode and preemption are the same for
all. `Paged` takes pages as they are needed and shares them. `Contiguous` gives every sequence one chunk of consecutive
pages when its request is admitted, sized for a length that was guessed: the systems before paging, as the vLLM paper
rebuilt them (Kwon et al. 2023, section 6.1, "Orca"). Block tables name the pages of a chunk one after the other, so
kernels, batches and the engine know nothing of it.

A policy is asked in this order: `try_place` when a request is admitted; `fork` for a further sample or beam; `append`
before tokens are written; `release` when a sequence has ended; `settle` when forks and releases of a group are over.
`leave` says which finished groups go. Other ways to keep KV answer the same questions: dense rows and static
batches (dense_rows.py), and no cache at all (no_cache.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

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
from jaxpaged.host.pages.token_tree import Placement, num_pages_of
from jaxpaged.host.sequence import SequenceGroup
from jaxpaged.host.systems.contiguous import ChunkAllocator


class Policy(Protocol):
    """What the scheduler asks of a way to keep KV memory."""

    is_cached: bool  # whether a step finds the keys and values of earlier ones; else it computes all of them

    @property
    def allocator(self) -> PageAllocator | ChunkAllocator: ...

    def expect(self, output_len: int) -> None:
        """A request that may generate so many tokens is part of the run."""
        ...

    @property
    def page_size(self) -> int: ...

    @property
    def shares_pages(self) -> bool:
        """Whether several tables may name one page."""
        ...

    def check(self, prompt_len: int, num_samples: int, max_len: int, prefix_len: int = 0) -> None:
        """ValueError, with the numbers, for a request that the empty pool could not hold.

        `prefix_len`: tokens of the prompt that the run shares; 0 where no pages are shared.
        """
        ...

    def try_place(self, group: SequenceGroup, placements: list[Placement], headroom: Callable[[], int]) -> bool:
        """Memory for a group that is to be prefilled: all of it, or False. `headroom()`: pages others need soon."""
        ...

    def fork(self, table: BlockTable) -> BlockTable:
        """A table for a further sequence that so far has the same tokens. Cannot fail."""
        ...

    def refork(self, table: BlockTable, parent: BlockTable) -> tuple[int, int]:
        """Give up what the table has and fork the parent in its place: common first pages, and pages freed."""
        ...

    def append(self, tables: list[BlockTable], counts: list[int]) -> list[PageCopy]:
        """Room for more positions, in all tables or, with OutOfPagesError, in none; and what must be copied first."""
        ...

    def release(self, table: BlockTable) -> int:
        """The sequence has ended, or gives way; returns how many pages became free."""
        ...

    def settle(self, group: SequenceGroup) -> None:
        """The group's forks and releases of this step are over."""
        ...

    def leave(self, finished: list[SequenceGroup]) -> list[SequenceGroup]:
        """These groups have no more to compute; returns the groups, of them and of earlier ones, that leave now."""
        ...

    @property
    def num_idle_rows(self) -> int:
        """Rows of a decode step that compute for sequences which have ended, but not left."""
        ...

    def take_copies(self) -> list[PageCopy]:
        """Copies that forks and placements asked for, to be carried out before the step that is planned next writes."""
        ...

    @property
    def requested_slots(self) -> int:
        """Token positions that sequences have asked for so far and not given back."""
        ...

    def tick(self, num_steps: int) -> None:
        """So many steps were planned, and taken down."""
        ...

    def final_slots(self, num_steps: int) -> np.ndarray | None:
        """Token positions i64[steps] that those who held memory at each step had filled when they gave it back.

        What is still held counts as it is filled now. None: nothing is held but what is filled.
        """
        ...

    def check_invariants(self, tables: Iterable[BlockTable]) -> None:
        """What these tables, all that there are, name is what the allocator has given. For tests, between steps."""
        ...


class Paged:
    """Pages as they are needed, shared by reference count."""

    shares_pages = True
    is_cached = True
    num_idle_rows = 0

    def __init__(self, cache: CacheConfig):
        self.page_size = cache.page_size
        self.num_usable_pages = cache.num_usable_pages
        self.allocator = PageAllocator(cache.num_pages, cache.page_size)
        self._prefix = BlockTable()
        self._copies: list[PageCopy] = []

    def check(self, prompt_len: int, num_samples: int, max_len: int, prefix_len: int = 0) -> None:
        needed = most_pages(prompt_len, num_samples, max_len, self.page_size, prefix_len)
        if needed > self.num_usable_pages:
            raise ValueError(
                f"{prompt_in_words(prompt_len, prefix_len)} with {num_samples} sample(s) of up to "
                f"{max_len - prompt_len} tokens needs {needed} pages of {self.page_size} tokens, "
                f"the pool has {self.num_usable_pages}: raise num_pages, or lower max_tokens or n"
            )

    def try_place(self, group: SequenceGroup, placements: list[Placement], headroom: Callable[[], int]) -> bool:
        needed, free = num_pages_of(placements, self.page_size), self.allocator.num_free
        if needed > free or needed + headroom() > free:  # the headroom takes a look at every running sequence
            return False
        for i, (sequence, num_shared, num_to_compute) in enumerate(placements):
            if num_shared:
                parent = self._prefix if num_shared == group.prefix_len else placements[i - 1].sequence.table
                sequence.table = fork(parent, self.allocator)
                truncate(sequence.table, num_shared, self.allocator)
            copies = append_slots([sequence.table], [num_to_compute], self.allocator)
            group.pages.copied += len(copies)
            self._copies += copies
        return True

    def place_prefix(self, num_tokens: int) -> BlockTable:
        """Pages for the prefix that all groups of the run share; the pool is empty, and has room (`check`)."""
        append_slots([self._prefix], [num_tokens], self.allocator)
        return self._prefix

    def fork(self, table: BlockTable) -> BlockTable:
        return fork(table, self.allocator)

    def refork(self, table: BlockTable, parent: BlockTable) -> tuple[int, int]:
        return refork(table, parent, self.allocator)

    def append(self, tables: list[BlockTable], counts: list[int]) -> list[PageCopy]:
        return append_slots(tables, counts, self.allocator)

    def release(self, table: BlockTable) -> int:
        return release(table, self.allocator)

    def expect(self, output_len: int) -> None:
        """Nothing depends on requests that have not come."""

    def settle(self, group: SequenceGroup) -> None:
        """Nothing is left over: pages went back one by one."""

    def leave(self, finished: list[SequenceGroup]) -> list[SequenceGroup]:
        return finished

    def take_copies(self) -> list[PageCopy]:
        copies, self._copies = self._copies, []
        return copies

    @property
    def requested_slots(self) -> int:
        return self.allocator.num_used * self.page_size

    def tick(self, num_steps: int) -> None:
        """Nothing here has to be told by its time."""

    def final_slots(self, num_steps: int) -> None:
        return None

    def check_invariants(self, tables: Iterable[BlockTable]) -> None:
        """Reference counts equal table entries, free and held pages partition the pool."""
        self.allocator.check_invariants()
        held = Counter(page_id for table in tables for page_id in table.pages)
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
