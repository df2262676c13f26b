"""Contiguous chunks of pages, for the systems before paging: each chunk is a power of two, placed at a multiple of it.

The allocator of the vLLM paper's Orca baselines (Kwon et al. 2023, section 6.1, and its artifact): the smallest free
chunk that is large enough is halved until it fits; a chunk that comes back is joined with the other half of what it was
cut from, as long as that is free, too.
"""

from __future__ import annotations

from jaxpaged.host.pages.page_allocator import OutOfPagesError
from jaxpaged.step_io import NULL_PAGE


def chunk_pages_for(num_pages: int) -> int:
    """Pages of the smallest chunk that holds `num_pages`."""
    return 1 << max(num_pages - 1, 0).bit_length()


class BuddyAllocator:
    """Chunks of the pages 1 .. num_pages - 1, none larger than `max_chunk`, a power of two.

    Free chunks of one size are a stack: the one that came back last goes first.
    """

    def __init__(self, num_pages: int, page_size: int, max_chunk: int):
        assert max_chunk > 0 and max_chunk & (max_chunk - 1) == 0, f"{max_chunk} is not a power of two"
        self.num_pages = num_pages
        self.page_size = page_size
        self.max_chunk = max_chunk
        self.num_free = num_pages - 1
        # By size, the places (page - 1) at which free chunks start; a dict is a stack from which any can be taken.
        self._free: dict[int, dict[int, None]] = {1 << i: {} for i in range(max_chunk.bit_length())}
        self._used: dict[int, int] = {}  # place -> pages
        place = 0
        while place < self.num_free:  # the largest that still fit, from the start on
            size = min(max_chunk, 1 << (self.num_free - place).bit_length() - 1)
            self._free[size][place] = None
            place += size
        self._initial = {size: len(places) for size, places in self._free.items()}

    @property
    def num_used(self) -> int:
        return self.num_pages - 1 - self.num_free

    @property
    def largest_free(self) -> int:
        """Pages of the largest free chunk."""
        return max((size for size, places in self._free.items() if places), default=0)

    def chunk_pages_for(self, num_pages: int) -> int:
        return chunk_pages_for(num_pages)

    def capacity(self, size: int) -> int:
        """How many chunks of `size` pages the pool holds when it is empty."""
        return sum(count * (larger // size) for larger, count in self._initial.items() if larger >= size)

    def allocate_chunk(self, size: int) -> int:
        """The first page of a free chunk of `size` pages, a power of two; OutOfPagesError, nothing changed, if none."""
        found = next((larger for larger, places in self._free.items() if larger >= size and places), None)
        if found is None:
            raise OutOfPagesError(f"no {size} pages in a row are free, at a multiple of {size}")
        place, _ = self._free[found].popitem()
        while found > size:
            found //= 2
            self._free[found][place + found] = None
        self._used[place] = size
        self.num_free -= size
        return place + NULL_PAGE + 1

    def release_chunk(self, first_page: int) -> None:
        place = first_page - NULL_PAGE - 1
        assert place in self._used, f"no chunk starts at page {first_page}"
        size = self._used.pop(place)
        self.num_free += size
        while size < self.max_chunk and place ^ size in self._free[size]:
            del self._free[size][place ^ size]
            place &= ~size
            size *= 2
        self._free[size][place] = None

    def check_invariants(self) -> None:
        """Free and used chunks partition the pool, each at a multiple of its size, and no free pair is left apart."""
        chunks = [(place, size) for size, places in self._free.items() for place in places]
        for place, size in chunks:
            assert size == self.max_chunk or place ^ size not in self._free[size], f"free halves at {place} lie apart"
        chunks = sorted([*chunks, *self._used.items()])
        end = 0
        for place, size in chunks:
            assert place == end and place % size == 0, f"chunk of {size} at {place}, after one that ends at {end}"
            end = place + size
        assert end == self.num_pages - 1, f"chunks end at {end}"
        assert sum(self._used.values()) == self.num_used
