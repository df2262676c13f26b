"""Block tables: append, fork, truncate and release, the only code that moves pages between sequences.

A table lists the pages of one sequence in token order and covers its first `num_slots` token positions. Tables may
share pages; how full a page is belongs to the table, not to the page, since after truncate and fork two tables may
see different fill of one page. A position is written in place only where its page has one holder: otherwise
`append_slots` replaces the page by a fresh one and reports a `PageCopy`, which the device carries out before the step
writes.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxpaged.host.page_allocator import OutOfPagesError, PageAllocator


class PageCopy(NamedTuple):
    """Copy the keys and values of page `src` to page `dst`, in every layer."""

    src: int
    dst: int


@dataclass(slots=True, eq=False)  # compared by identity
class BlockTable:
    """Pages of one sequence in token order; `len(pages) == num_pages_for(num_slots, page_size)`."""

    pages: array = field(default_factory=lambda: array("i"))  # int32: numpy reads it without a conversion
    num_slots: int = 0


def num_pages_for(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size)


def num_pages_needed(tables: Sequence[BlockTable], counts: Sequence[int], allocator: PageAllocator) -> int:
    """Pages that `append_slots` would take for these arguments: new ones, and copies of shared last pages."""
    size = allocator.page_size
    needed = 0
    writers: Counter[int] = Counter()
    for table, count in zip(tables, counts, strict=True):
        pages = table.pages
        needed += -(-(table.num_slots + count) // size) - len(pages)
        if table.num_slots % size and count and allocator.ref_count(pages[-1]) > 1:
            writers[pages[-1]] += 1
    # The last holder of a page writes in place, if all holders write.
    return needed + sum(n - (n == allocator.ref_count(page_id)) for page_id, n in writers.items())


def append_slots(tables: Sequence[BlockTable], counts: Sequence[int], allocator: PageAllocator) -> list[PageCopy]:
    """Make room for `counts[i]` more token positions in each table; all of them or none.

    Raises OutOfPagesError, with nothing changed, where the free pages do not suffice.
    """
    needed = num_pages_needed(tables, counts, allocator)
    if needed > allocator.num_free:
        raise OutOfPagesError(f"{needed} pages are needed, {allocator.num_free} are free")
    size = allocator.page_size
    copies = []
    for table, count in zip(tables, counts, strict=True):
        if count and table.num_slots % size:
            last = table.pages[-1]
            if allocator.ref_count(last) > 1:
                copies.append(PageCopy(last, allocator.allocate()))
                allocator.release(last)
                table.pages[-1] = copies[-1].dst
        table.num_slots += count
        while len(table.pages) * size < table.num_slots:
            table.pages.append(allocator.allocate())
    return copies


def fork(table: BlockTable, allocator: PageAllocator) -> BlockTable:
    """A second table over the same pages. Takes no page, copies nothing, cannot fail."""
    for page_id in table.pages:
        allocator.share(page_id)
    return BlockTable(table.pages[:], table.num_slots)


def truncate(table: BlockTable, num_slots: int, allocator: PageAllocator) -> int:
    """Forget the positions from `num_slots` on; returns how many pages became free. Copies nothing."""
    assert 0 <= num_slots <= table.num_slots, f"cannot truncate {table.num_slots} positions to {num_slots}"
    table.num_slots = num_slots
    freed = 0
    # In reverse: the free list is a stack, so the pages that are needed soonest after a resume come back first.
    for _ in range(len(table.pages) - num_pages_for(num_slots, allocator.page_size)):
        freed += allocator.release(table.pages.pop())
    return freed


def release(table: BlockTable, allocator: PageAllocator) -> int:
    """Give all pages back; returns how many became free."""
    return truncate(table, 0, allocator)
