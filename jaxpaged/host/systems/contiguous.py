"""A chunk of consecutive pages for every sequence when its request is admitted: the systems before paging.

The baselines of the vLLM paper (Kwon et al. 2023, section 6.1, "Orca"), which differ in how they guess a sequence's
length. It is a policy like paging (reservation.py): the scheduler does not know which of them it has.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from jaxpaged.config import CacheConfig
from jaxpaged.host.pages.block_table import BlockTable, PageCopy, num_pages_for
from jaxpaged.host.pages.page_allocator import OutOfPagesError
from jaxpaged.host.pages.token_tree import SequencePlacement
from jaxpaged.host.sequence import SequenceGroup
from jaxpaged.host.systems.buddy_allocator import BuddyAllocator, chunk_pages_for
from jaxpaged.host.systems.roles import ChunkAllocator, LeavesAtOnce


def estimate_max(prompt_len: int, max_len: int, max_model_len: int) -> int:
    """Orca (Max): every sequence may reach the model's length."""
    return max_model_len


def estimate_pow2(prompt_len: int, max_len: int, max_model_len: int) -> int:
    """Orca (Pow2): the output is known up to a factor of two: rounded up to a power of two."""
    return prompt_len + (1 << (max_len - prompt_len - 1).bit_length())


def estimate_oracle(prompt_len: int, max_len: int, max_model_len: int) -> int:
    """Orca (Oracle): the output's length is known.

    It is `max_tokens`, so the oracle is one where the end of sequence is ignored; elsewhere it reserves too much.
    """
    return max_len


ESTIMATES = {
    "contiguous-max": estimate_max,
    "contiguous-pow2": estimate_pow2,
    "contiguous-oracle": estimate_oracle,
}


@dataclass(slots=True)
class Chunk:
    """Consecutive pages that one sequence has to itself."""

    first_page: int
    num_pages: int
    num_requested: int  # token positions that were asked for; the chunk is rounded up from them
    born: int  # step of the run
    num_filled: int = 0  # the most token positions that a sequence which has left it had


@dataclass(slots=True, eq=False)
class ChunkTable(BlockTable):
    """A block table that names the first pages of a chunk, as many as are filled."""

    chunk: Chunk | None = None  # None: forked, and not settled yet
    copies: list[PageCopy] = field(default_factory=list)  # from the parent's chunk, to be carried out


@dataclass(slots=True)
class _Reservation:
    """The chunks of one group: one for each sequence that it may have."""

    num_chunks: int
    free: list[Chunk]
    forks: list[tuple[ChunkTable, ChunkTable]] = field(default_factory=list)  # parent and child without a chunk


class Contiguous(LeavesAtOnce):
    """A chunk for every sequence of a group when the group is admitted. Nothing is shared, grows, or gives way.

    A fork copies the parent's pages into a chunk of its group: a reserved one, or one that a dropped beam leaves.
    """

    shares_pages = False
    window = None

    def __init__(
        self,
        cache: CacheConfig,
        max_model_len: int,
        estimate: Callable[[int, int, int], int],
        allocator: ChunkAllocator | None = None,
    ):
        """`allocator`: None for the buddy allocator."""
        self.page_size = cache.page_size
        self.max_model_len = max_model_len
        self.estimate = estimate
        largest = chunk_pages_for(num_pages_for(max_model_len, cache.page_size))
        self.allocator = allocator or BuddyAllocator(cache.num_pages, cache.page_size, largest)
        self.requested_slots = 0
        self._clock = 0  # steps that were taken down
        # Of chunks that are done: first step, step after the last, positions filled. Flat, since there may be millions.
        self._lives = array("q")
        self._reservations: dict[SequenceGroup, _Reservation] = {}
        self._owners: dict[ChunkTable, _Reservation] = {}
        self._forked: list[tuple[SequenceGroup, ChunkTable]] = []

    def num_requested_for(self, prompt_len: int, max_len: int) -> int:
        return min(self.estimate(prompt_len, max_len, self.max_model_len), self.max_model_len)

    def check(self, prompt_len: int, num_samples: int, max_len: int, prefix_len: int = 0) -> None:
        requested = self.num_requested_for(prompt_len, max_len)
        size = self.allocator.chunk_pages_for(num_pages_for(requested, self.page_size))
        fitting = self.allocator.capacity(size) if size <= self.allocator.max_chunk else 0
        if num_samples > fitting:
            raise ValueError(
                f"prompt of {prompt_len} tokens with {num_samples} sample(s) of up to {max_len - prompt_len} tokens "
                f"reserves {num_samples} chunk(s) of {size} pages in a row ({requested} tokens each), and the empty "
                f"pool of {self.allocator.num_pages - 1} pages of {self.page_size} tokens holds {fitting}: "
                "raise num_pages, lower max_model_len, max_tokens or n, or use kv_cache='paged'"
            )

    def try_place(self, group: SequenceGroup, placements: list[SequencePlacement], headroom: Callable[[], int]) -> bool:
        requested = self.num_requested_for(group.prompt_len, group.max_len)
        size = self.allocator.chunk_pages_for(num_pages_for(requested, self.page_size))
        chunks: list[Chunk] = []
        try:
            while len(chunks) < group.num_rows:
                chunks.append(Chunk(self.allocator.allocate_chunk(size), size, requested, self._clock))
        except OutOfPagesError:
            for chunk in reversed(chunks):
                self.allocator.release_chunk(chunk.first_page)
            return False
        self.requested_slots += requested * len(chunks)
        (placement,) = placements  # whoever was admitted stays, so only prompts are placed
        chunks.reverse()
        table = ChunkTable(chunk=chunks.pop())
        reservation = self._reservations[group] = _Reservation(group.num_rows, chunks)
        self._owners[table] = reservation
        placement.sequence.table = table
        self._fill(table, placement.num_to_compute)
        return True

    def fork(self, table: BlockTable) -> ChunkTable:
        assert isinstance(table, ChunkTable)
        child = ChunkTable(num_slots=table.num_slots)
        reservation = self._owners[child] = self._owners[table]
        reservation.forks.append((table, child))
        return child

    def refork(self, table: BlockTable, parent: BlockTable) -> tuple[int, int]:
        assert isinstance(table, ChunkTable) and isinstance(parent, ChunkTable)
        self._leave_chunk(table)
        table.num_slots = parent.num_slots
        self._owners[table].forks.append((parent, table))
        return 0, 0

    def append(self, tables: list[BlockTable], counts: list[int]) -> list[PageCopy]:
        for table, count in zip(tables, counts, strict=True):
            self._fill(table, count)
        return []

    def _fill(self, table: BlockTable, count: int) -> None:
        assert isinstance(table, ChunkTable) and table.chunk is not None
        table.num_slots += count
        assert table.num_slots <= table.chunk.num_requested, "a sequence outgrew its reservation"
        while len(table.pages) * self.page_size < table.num_slots:
            table.pages.append(table.chunk.first_page + len(table.pages))

    def release(self, table: BlockTable) -> int:
        assert isinstance(table, ChunkTable)
        self._leave_chunk(table)
        del self._owners[table]
        return 0  # chunks go back when the group has no use for them: `settle`

    def _leave_chunk(self, table: ChunkTable) -> None:
        reservation = self._owners[table]
        if table.chunk is None:
            reservation.forks = [pair for pair in reservation.forks if pair[1] is not table]
        else:
            # The token that ended the sequence had its place, though its KV is never written.
            filled = min(table.num_slots + 1, table.chunk.num_requested)
            table.chunk.num_filled = max(table.chunk.num_filled, filled)
            reservation.free.append(table.chunk)
        table.chunk, table.copies, table.pages, table.num_slots = None, [], array("i"), 0

    def settle(self, group: SequenceGroup) -> None:
        """Forked tables get their chunks, and what no sequence of the group needs any more goes back."""
        reservation = self._reservations[group]
        for parent, child in reservation.forks:
            child.chunk = reservation.free.pop()
            first = child.chunk.first_page
            child.pages.extend(range(first, first + len(parent.pages)))
            child.copies = [PageCopy(*pair) for pair in zip(parent.pages, child.pages, strict=True)]
            self._forked.append((group, child))
        reservation.forks.clear()
        while reservation.free and reservation.num_chunks > group.num_rows:
            chunk = reservation.free.pop()
            reservation.num_chunks -= 1
            self._lives.extend((chunk.born, self._clock, chunk.num_filled))
            self._give_back(chunk)
        if not reservation.num_chunks:
            del self._reservations[group]

    def _give_back(self, chunk: Chunk) -> None:
        self.allocator.release_chunk(chunk.first_page)
        self.requested_slots -= chunk.num_requested

    def take_copies(self) -> list[PageCopy]:
        copies: list[PageCopy] = []
        for group, table in self._forked:
            copies += table.copies
            group.pages.copied += len(table.copies)
            table.copies = []
        self._forked.clear()
        return copies

    def check_invariants(self, tables: Iterable[BlockTable]) -> None:
        """Every table is the start of a chunk of its own, and no chunk is without a group."""
        self.allocator.check_invariants()
        held = [table for table in tables if table.num_slots]
        assert set(held) == set(self._owners), "a table has no reservation, or a reservation no table"
        chunks = self._held_chunks()
        assert sum(chunk.num_pages for chunk in chunks) == self.allocator.num_used
        assert len({chunk.first_page for chunk in chunks}) == len(chunks), "a chunk has two owners"
        assert sum(chunk.num_requested for chunk in chunks) == self.requested_slots
        for table in held:
            assert isinstance(table, ChunkTable) and table.chunk is not None
            first = table.chunk.first_page
            assert list(table.pages) == list(range(first, first + len(table.pages)))
            assert len(table.pages) <= table.chunk.num_pages

    @property
    def hindsight(self) -> Contiguous:
        return self

    def tick(self, num_steps: int) -> None:
        self._clock += num_steps

    def final_slots(self, num_steps: int) -> np.ndarray:
        lives = np.array(self._lives, np.int64).reshape(-1, 3)
        filled = {id(table.chunk): table.num_slots for table in self._owners if table.chunk is not None}
        still = [(c.born, num_steps, max(c.num_filled, filled.get(id(c), 0))) for c in self._living()]
        born, gone, slots = np.concatenate([lives, np.array(still, np.int64).reshape(-1, 3)]).T
        change = np.zeros(num_steps + 1, np.int64)
        np.add.at(change, born, slots)
        np.subtract.at(change, gone, slots)
        return np.cumsum(change[:-1])

    def _held_chunks(self) -> list[Chunk]:
        """Chunks that the allocator has given."""
        return self._living()

    def _living(self) -> list[Chunk]:
        """Chunks of sequences that have not ended, or may yet come."""
        held = [table.chunk for table in self._owners if table.chunk is not None]
        return held + [chunk for reservation in self._reservations.values() for chunk in reservation.free]
