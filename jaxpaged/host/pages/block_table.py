"""Block tables: append, fork, truncate and release, the only code that moves pages between sequences.

A table lists the pages of one sequence in token order and covers its first `num_slots` token positions. Tables may
share pages; how full a page is belongs to the table, not to the page, since after truncate and fork two tables may
see different fill of one page. A position is written in place only where its page has one holder: otherwise
`append_slots` replaces the page by a fresh one and reports a `PageCopy`, which the device carries out before the step
writes.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxpaged.host.pages.page_allocator import OutOfPagesError, PageAllocator


class PageCopy(NamedTuple):
    """Copy the keys and values of page `src` to page `dst`, in every layer."""

    src: int
    dst: int


@dataclass(slots=True, eq=False)  # compared by identity
class BlockTable:
    """Pages of one sequence in token order; `len(pages) == num_pages_for(num_slots, page_size)`."""

    pages: array = field(default_factory=lambda: array("i"))  # int32: numpy reads it without a conversion
    num_slots: int = 0
    num_gone: int = 0  # first entries that are NULL_PAGE, since no window reaches these positions any more (window.py)

    @property
    def held(self) -> array:
        """The pages without what is gone."""
        return self.pages[self.num_gone :] if self.num_gone else self.pages


def num_pages_for(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size)


def num_pages_needed(tables: Sequence[BlockTable], counts: Sequence[int], allocator: PageAllocator) -> int:
    """Pages that `append_slots` would take for these arguments: new ones, and copies of shared last pages."""
    size, ref_counts = allocator.page_size, allocator.ref_counts
    needed = 0
    writers: dict[int, int] = {}
    for table, count in zip(tables, counts, strict=True):
        num_slots, pages = table.num_slots, table.pages
        needed += -(-(num_slots + count) // size) - len(pages)
        if num_slots % size and count and ref_counts[pages[-1]] > 1:
            writers[pages[-1]] = writers.get(pages[-1], 0) + 1
    # The last holder of a page writes in place, if all holders write.
    return needed + sum(n - (n == ref_counts[page_id]) for page_id, n in writers.items())


def append_slots(tables: Sequence[BlockTable], counts: Sequence[int], allocator: PageAllocator) -> list[PageCopy]:
    """Make room for `counts[i]` more token positions in each table; all of them or none.

    Raises OutOfPagesError, with nothing changed, where the free pages do not suffice.
    """
    size, ref_counts = allocator.page_size, allocator.ref_counts
    at_most = sum(counts) // size + 2 * len(
        tables
    )  # a table may copy its last page, and begin one that it does not fill
    if at_most > allocator.num_free and (needed := num_pages_needed(tables, counts, allocator)) > allocator.num_free:
        raise OutOfPagesError(f"{needed} pages are needed, {allocator.num_free} are free")
    copies = []
    for table, count in zip(tables, counts, strict=True):
        num_slots, pages = table.num_slots, table.pages
        if count and num_slots % size:
            last = pages[-1]
            if ref_counts[last] == 1 and count == 1:  # nearly every table of nearly every step
                table.num_slots = num_slots + 1
                continue
            if ref_counts[last] > 1:
                pages[-1] = allocator.allocate()
                copies.append(PageCopy(last, pages[-1]))
                allocator.release(last)
        table.num_slots = num_slots = num_slots + count
        while len(pages) * size < num_slots:
            pages.append(allocator.allocate())
    return copies


def fork(table: BlockTable, allocator: PageAllocator) -> BlockTable:
    """A second table over the same pages. Takes no page, copies nothing, cannot fail."""
    allocator.share_all(table.held)
    return BlockTable(table.pages[:], table.num_slots, table.num_gone)


def refork(table: BlockTable, parent: BlockTable, allocator: PageAllocator) -> tuple[int, int]:
    """Make `table` a fork of `parent`: as forking anew and releasing `table`, but only pages that differ are touched.

    Returns how many first pages the two had in common, and how many pages became free. Both must have come from one
    table by forks: then all pages before one that they have in common are common too, since a table only ever
    replaces its last page. Pages that are gone, of both as many, tell nothing of what they had in common.
    """
    assert table.num_gone == parent.num_gone, f"{table.num_gone} pages are gone, of the parent {parent.num_gone}"
    old, new = table.pages, parent.pages
    common = min(len(old), len(new))
    while common and old[common - 1] != new[common - 1]:
        common -= 1
    fresh, stale = new[common:], old[common:]
    allocator.share_all(fresh)
    freed = allocator.release_all(stale)
    old[common:] = fresh
    table.num_slots = parent.num_slots
    return common if common > table.num_gone else 0, freed


def truncate(table: BlockTable, num_slots: int, allocator: PageAllocator) -> int:
    """Forget the positions from `num_slots` on; returns how many pages became free. Copies nothing.

    A page that is cut is known by its tokens no more: it may be written in place.
    """
    assert 0 <= num_slots <= table.num_slots, f"cannot truncate {table.num_slots} positions to {num_slots}"
    kept = num_pages_for(num_slots, allocator.page_size)
    if num_slots % allocator.page_size and num_slots < table.num_slots:
        allocator.known.forget(table.pages[kept - 1])
    table.num_slots = num_slots
    freed = allocator.release_all(table.pages[max(kept, table.num_gone) :])
    del table.pages[kept:]
    table.num_gone = min(table.num_gone, kept)
    return freed


def release(table: BlockTable, allocator: PageAllocator) -> int:
    """Give all pages back; returns how many became free."""
    return truncate(table, 0, allocator)
