"""What is asked of a way to keep KV memory, by who asks: who needs one role takes no more than that.

A policy has all of them (policies.py). It is asked in this order: `try_place` when a request is admitted; `fork` for a
further sample or beam; `append` before tokens are written; `release` when a sequence has ended; `settle` when forks and
releases of a group are over. `leave` says which finished groups go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from jaxpaged.host.pages.block_table import BlockTable, PageCopy
from jaxpaged.host.pages.page_allocator import PageAllocator
from jaxpaged.host.pages.token_tree import SequencePlacement
from jaxpaged.host.pages.window import PageWindow
from jaxpaged.host.sequence import SequenceGroup


class ChunkAllocator(Protocol):
    """Chunks of consecutive pages: BuddyAllocator has powers of two, RowAllocator (dense_rows.py) one size."""

    num_pages: int
    page_size: int
    max_chunk: int

    @property
    def num_used(self) -> int: ...
    @property
    def num_free(self) -> int: ...
    @property
    def largest_free(self) -> int: ...
    def chunk_pages_for(self, num_pages: int) -> int: ...
    def capacity(self, size: int) -> int: ...
    def allocate_chunk(self, size: int) -> int: ...
    def release_chunk(self, first_page: int) -> None: ...
    def check_invariants(self) -> None: ...


class Memory(Protocol):
    """Room for sequences: what the scheduler asks for and gives back."""

    @property
    def allocator(self) -> PageAllocator | ChunkAllocator: ...

    @property
    def window(self) -> PageWindow | None:
        """By which sequences give pages back while they go on; None where they keep all."""
        ...

    def check(self, prompt_len: int, num_samples: int, max_len: int, prefix_len: int = 0) -> None:
        """ValueError, with the numbers, for a request that the empty pool could not hold.

        `prefix_len`: tokens of the prompt that the run shares; 0 where no pages are shared.
        """
        ...

    def try_place(self, group: SequenceGroup, placements: list[SequencePlacement], headroom: Callable[[], int]) -> bool:
        """Memory for a group that is to be prefilled: all of it, or False. `headroom()`: pages others need soon."""
        ...

    def append(self, tables: list[BlockTable], counts: list[int]) -> list[PageCopy]:
        """Room for more positions, in all tables or, with OutOfPagesError, in none; and what must be copied first."""
        ...

    def release(self, table: BlockTable) -> int:
        """The sequence has ended, or gives way; returns how many pages became free."""
        ...

    def take_copies(self) -> list[PageCopy]:
        """Copies that forks and placements asked for, to be carried out before the step that is planned next writes."""
        ...


class Forks(Protocol):
    """Tables of samples and beams, which come and go within a group."""

    @property
    def page_size(self) -> int: ...

    @property
    def window(self) -> PageWindow | None:
        """As of `Memory`."""
        ...

    @property
    def shares_pages(self) -> bool:
        """Whether several tables may name one page."""
        ...

    def fork(self, table: BlockTable) -> BlockTable:
        """A table for a further sequence that so far has the same tokens. Cannot fail."""
        ...

    def refork(self, table: BlockTable, parent: BlockTable) -> tuple[int, int]:
        """Give up what the table has and fork the parent in its place: common first pages, and pages freed."""
        ...

    def release(self, table: BlockTable) -> int:
        """As of `Memory`."""
        ...

    def settle(self, group: SequenceGroup) -> None:
        """The group's forks and releases of this step are over."""
        ...


class Leaving(Protocol):
    """When finished groups go: at once, or with their batch."""

    @property
    def num_idle_rows(self) -> int:
        """Rows of a decode step that compute for sequences which have ended, but not left."""
        ...

    def leave(self, finished: list[SequenceGroup], longest_output: int) -> list[SequenceGroup]:
        """These groups have no more to compute; returns the groups, of them and of earlier ones, that leave now.

        `longest_output`: tokens that any request of the run may generate at most.
        """
        ...


class Hindsight(Protocol):
    """What was reserved, as it turned out to be filled: known when it is given back."""

    def tick(self, num_steps: int) -> None:
        """So many steps were planned, and taken down."""
        ...

    def final_slots(self, num_steps: int) -> np.ndarray:
        """Token positions i64[steps] that those who held memory at each step had filled when they gave it back.

        What is still held counts as it is filled now.
        """
        ...


class Held(Protocol):
    """What the account of a run asks after each step."""

    @property
    def requested_slots(self) -> int:
        """Token positions that sequences have asked for so far and not given back."""
        ...

    @property
    def hindsight(self) -> Hindsight | None:
        """None: nothing is held but what is filled."""
        ...


class Policy(Memory, Forks, Leaving, Held, Protocol):
    """A way to keep KV memory, as the scheduler has one."""

    def check_invariants(self, tables: Iterable[BlockTable]) -> None:
        """What these tables, all that there are, name is what the allocator has given. For tests, between steps."""
        ...


class LeavesAtOnce:
    """The `Leaving` of all but static batches: nobody waits for another."""

    @property
    def num_idle_rows(self) -> int:
        return 0

    def leave(self, finished: list[SequenceGroup], longest_output: int) -> list[SequenceGroup]:
        return finished
