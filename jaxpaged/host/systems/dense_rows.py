"""Dense rows of `max_model_len` tokens, the caches before paging: fixed rows of one array, taken whole.

A sequence has a dense row to itself from admission on, so what it will not fill is lost. Two ways to use them:

* continuous batching, as JAX servers do over a cache `[rows, max_len]`: `Contiguous` over a `RowAllocator`;
* static batching, as FasterTransformer and `generate` do: `StaticBatches`, where a batch begins and ends as a whole.

A dense row is a run of pages like any other chunk, so tables, copies and the account are counted as for the other
systems, and what the pool holds beyond a multiple of the row's length stays free.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxpaged.config import CacheConfig, EngineConfig, num_dense_rows
from jaxpaged.host.pages.block_table import BlockTable, PageCopy, num_pages_for
from jaxpaged.host.pages.page_allocator import OutOfPagesError
from jaxpaged.host.pages.token_tree import SequencePlacement
from jaxpaged.host.sequence import SequenceGroup
from jaxpaged.host.systems.contiguous import Chunk, Contiguous, estimate_max
from jaxpaged.step_io import NULL_PAGE


class RowAllocator:
    """Chunks of one size, dense rows one after the other from page 1 on. The one that came back last goes first.

    Raises ValueError for a pool that holds none.
    """

    def __init__(self, cache: CacheConfig, max_model_len: int):
        self.num_pages = cache.num_pages
        self.page_size = cache.page_size
        self.max_chunk = num_pages_for(max_model_len, cache.page_size)
        self.num_dense_rows = num_dense_rows(cache, max_model_len)
        self._free = [NULL_PAGE + 1 + i * self.max_chunk for i in reversed(range(self.num_dense_rows))]
        self._used: set[int] = set()

    def chunk_pages_for(self, num_pages: int) -> int:
        """Pages of a dense row, whatever is asked for."""
        return self.max_chunk

    @property
    def num_used(self) -> int:
        return len(self._used) * self.max_chunk

    @property
    def num_free(self) -> int:
        return self.num_pages - 1 - self.num_used

    @property
    def largest_free(self) -> int:
        """Pages that can be taken in one piece: those of a dense row, or none."""
        return self.max_chunk if self._free else 0

    def capacity(self, size: int) -> int:
        """How many dense rows the pool holds when it is empty."""
        return self.num_dense_rows

    def allocate_chunk(self, size: int) -> int:
        """The first page of a free row; OutOfPagesError if none is."""
        assert size == self.max_chunk, f"a dense row has {self.max_chunk} pages, not {size}"
        if not self._free:
            raise OutOfPagesError(f"all {self.num_dense_rows} dense rows are in use")
        self._used.add(first_page := self._free.pop())
        return first_page

    def release_chunk(self, first_page: int) -> None:
        assert first_page in self._used, f"no dense row in use starts at page {first_page}"
        self._used.remove(first_page)
        self._free.append(first_page)

    def check_invariants(self) -> None:
        """Free and used rows are all rows."""
        rows = sorted([*self._free, *self._used])
        assert rows == [NULL_PAGE + 1 + i * self.max_chunk for i in range(self.num_dense_rows)], rows


class StaticBatches(Contiguous):
    """Request-level batching: a batch is admitted when the one before it has ended, and runs until its longest ends.

    A batch takes requests until its first decode step. A sequence that has ended keeps its dense row and its row of
    the step: the matrix products of that one are computed and thrown away. Its attention is not, as in
    FasterTransformer's kernel (`generate` computes that, too). Results leave together, when the batch ends.

    `to_longest_of_all`: every batch runs until the longest request of the run would have ended, the naive static
    batching with which continuous batching was compared (Anyscale 2023), which pads every output to the same length.
    The longest is by `max_tokens`, since ends by a token are not known before.
    """

    def __init__(self, cache: CacheConfig, limits: EngineConfig, *, to_longest_of_all: bool):
        super().__init__(cache, limits.max_model_len, estimate_max, RowAllocator(cache, limits.max_model_len))
        self._to_longest_of_all = to_longest_of_all
        self._max_rows = limits.max_num_seqs
        self._num_decodes = 0  # of the batch so far
        self._ended: list[SequenceGroup] = []  # requests of the batch that wait for its end
        self._idle: list[Chunk] = []  # dense rows of sequences that have ended, but not the batch

    @property
    def num_idle_rows(self) -> int:
        return len(self._idle)

    def try_place(self, group: SequenceGroup, placements: list[SequencePlacement], headroom: Callable[[], int]) -> bool:
        num_rows = len(self._idle) + sum(reservation.num_chunks for reservation in self._reservations.values())
        if self._num_decodes or num_rows + group.num_rows > self._max_rows:
            return False
        return super().try_place(group, placements, headroom)

    def append(self, tables: list[BlockTable], counts: list[int]) -> list[PageCopy]:
        self._num_decodes += counts[0] if counts else 1  # all rows take as many steps
        return super().append(tables, counts)

    def leave(self, finished: list[SequenceGroup], longest_output: int) -> list[SequenceGroup]:
        self._ended += finished
        most_decodes = longest_output - 1 if self._to_longest_of_all else 0  # the first token comes from prefill
        if self._reservations or self._num_decodes < most_decodes:
            return []
        for chunk in reversed(self._idle):
            super()._give_back(chunk)
        left, self._ended, self._idle, self._num_decodes = self._ended, [], [], 0
        return left

    def _give_back(self, chunk: Chunk) -> None:
        self._idle.append(chunk)

    def _held_chunks(self) -> list[Chunk]:
        return super()._held_chunks() + self._idle
