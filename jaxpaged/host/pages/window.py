"""Pages that no window reaches any more: where every layer reads the last so many positions alone, a sequence gives the
pages before these back, and its table names NULL_PAGE in their places.

Counts are as ever: a page that other sequences hold stays with them, one that is known by its tokens rests. A page is
given back when the first step is planned that does not read it. The step before may still be on its way and read it;
but the device carries out one step after the other, so whoever gets the page writes later.

A prompt of one sequence takes no more pages at once than its next chunk needs beside the window: it is moved on, its
first pages given back and as many taken, when a chunk is planned. So a request may be longer than the pool. What it
takes anew is what it gave back, provided that nobody else has got hold of that: so pages of such a prompt cannot be
found by others while it still moves on (prefill_queue.py).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from jaxpaged.host.pages.block_table import BlockTable, append_slots, num_pages_for
from jaxpaged.host.pages.page_allocator import PageAllocator
from jaxpaged.step_io import NULL_PAGE


class PageWindow:
    """What sequences of a pool read, and so hold: the last `length` positions, that of the query included.

    Attributes:
        least_pages: of one sequence that decodes, at most, and with which its prompt can be computed.
        most_pages: of one sequence alone while its prompt is computed, in chunks of up to `chunk` tokens.
    """

    def __init__(self, length: int, chunk: int, allocator: PageAllocator):
        self.length = length
        self._allocator = allocator
        self._page_size = size = allocator.page_size
        self.least_pages = num_pages_for(length - 1, size) + 1
        self.most_pages = min(num_pages_for(length - 1 + chunk, size) + 1, allocator.num_pages - 1)

    def num_unread(self, position: int) -> int:
        """First pages of a table that neither the token at this position reads nor any behind it."""
        return max(0, (position - self.length + 1) // self._page_size)

    def gives_back(self, table: BlockTable) -> bool:
        """Whether the table still holds pages that its next token does not read."""
        return table.num_slots - self.length + 1 >= (table.num_gone + 1) * self._page_size

    def give_back(self, table: BlockTable, position: int) -> int:
        """Let go of what nothing from `position` on reads; returns how many pages became free."""
        gone, stop = table.num_gone, self.num_unread(position)
        if stop <= gone:
            return 0
        unread = table.pages[gone:stop]
        table.pages[gone:stop] = array("i", [NULL_PAGE]) * len(unread)
        table.num_gone = stop
        return self._allocator.release_all(unread)

    def num_first_slots(self, num_shared: int, num_to_compute: int) -> int:
        """Of the positions to compute behind the shared ones, those for which a prompt has pages from the beginning."""
        most = (num_shared // self._page_size + self.most_pages) * self._page_size
        return min(num_to_compute, most - num_shared)

    def move_on(self, table: BlockTable, start: int, length: int) -> None:
        """The next chunk of a prompt begins at `start`, of `length` positions in all: room for more of these, in as
        many pages as have been given back."""
        self.give_back(table, start)
        stop = min(length, (table.num_gone + self.most_pages) * self._page_size)
        if stop > table.num_slots:
            append_slots([table], [stop - table.num_slots], self._allocator)

    def can_take(self, found: Sequence[int], length: int) -> bool:
        """Whether the empty pool has room for a sequence of so many positions that shares these found pages."""
        new = min(num_pages_for(length, self._page_size) - len(found), self.most_pages)
        return len(found) - found.count(NULL_PAGE) + new < self._allocator.num_pages
