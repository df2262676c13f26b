"""Which pages of the pool are free, and how many block tables hold each of the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from jaxpaged.host.pages.prefix_cache import PrefixCache
from jaxpaged.step_io import NULL_PAGE


class OutOfPagesError(RuntimeError):
    """More pages were asked for than are free. Nothing was allocated."""


class PageAllocator:
    """A free list and reference counts over page ids 1 .. num_pages - 1; NULL_PAGE is never handed out.

    The free list is a stack: the page released last is handed out first, so a small working set stays small. A page
    that is known by its tokens (`known`) rests when nobody holds it: it can be found again, and is free all the same,
    for those that find no other.
    """

    def __init__(self, num_pages: int, page_size: int, prefix_caching: bool = False):
        self.num_pages = num_pages
        self.page_size = page_size
        self.known = PrefixCache(page_size, prefix_caching)
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))
        self._ref_counts = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self.known.resting)

    @property
    def num_resting(self) -> int:
        """Free pages that can be found by their tokens."""
        return len(self.known.resting)

    @property
    def num_used(self) -> int:
        return self.num_pages - 1 - self.num_free

    @property
    def largest_free(self) -> int:
        """Free pages that a table can take together: all, since pages may lie anywhere."""
        return self.num_free

    def ref_count(self, page_id: int) -> int:
        return self._ref_counts[page_id]

    @property
    def ref_counts(self) -> Sequence[int]:
        """Of every page, for who looks at many."""
        return self._ref_counts

    def allocate(self) -> int:
        """A free page, with one reference."""
        if self._free:
            page_id = self._free.pop()
        elif self.known.resting:
            page_id = self.known.give_up()
        else:
            raise OutOfPagesError(f"all {self.num_pages - 1} pages are in use")
        self._ref_counts[page_id] = 1
        return page_id

    def allocate_many(self, count: int) -> np.ndarray:
        """As many pages i32[count], each with one reference; all of them or OutOfPagesError."""
        if count > self.num_free:
            raise OutOfPagesError(f"{count} pages are needed, {self.num_free} are free")
        num_plain = min(count, len(self._free))
        taken = self._free[len(self._free) - num_plain :][::-1]
        del self._free[len(self._free) - num_plain :]
        for page_id in taken:
            self._ref_counts[page_id] = 1
        return np.array(taken + [self.allocate() for _ in range(count - num_plain)], np.int32)

    def share(self, page_id: int) -> None:
        """One more table holds this page."""
        assert self._ref_counts[page_id] > 0, f"page {page_id} is free and cannot be shared"
        self._ref_counts[page_id] += 1

    def share_found(self, page_ids: Iterable[int]) -> None:
        """One more table holds each of these pages, which are known: whether others do or they rest."""
        for page_id in page_ids:
            if not self._ref_counts[page_id]:
                del self.known.resting[page_id]
            self._ref_counts[page_id] += 1

    def release(self, page_id: int) -> bool:
        """One table fewer holds this page; True if it is now free."""
        return self.release_all((page_id,)) == 1

    def share_all(self, page_ids: Sequence[int]) -> None:
        """`share` each of them."""
        ref_counts = self._ref_counts
        for page_id in page_ids:
            assert ref_counts[page_id] > 0, f"page {page_id} is free and cannot be shared"
            ref_counts[page_id] += 1

    def release_all(self, page_ids: Sequence[int]) -> int:
        """`release` each of them, the last first; returns how many became free.

        In reverse, because the free list is a stack: the pages that are needed soonest come back first. And those that
        rest are given up from the end of a sequence.
        """
        ref_counts, freed = self._ref_counts, 0
        for page_id in reversed(page_ids):
            assert ref_counts[page_id] > 0, f"page {page_id} is released twice"
            ref_counts[page_id] -= 1
            if ref_counts[page_id] == 0:
                self._give_back(page_id)
                freed += 1
        return freed

    def _give_back(self, page_id: int) -> None:
        if page_id in self.known.hashes:
            self.known.resting[page_id] = None
        else:
            self._free.append(page_id)

    def drop_tables(self) -> None:
        """Nobody holds a page any more, an interrupt that lost one included; what is known stays so."""
        if self.num_used:
            free = {*self._free, *self.known.resting}
            self._ref_counts = [0] * self.num_pages
            for page_id in range(self.num_pages - 1, NULL_PAGE, -1):
                if page_id not in free:
                    self._give_back(page_id)

    def forget_all(self) -> None:
        """No page is known any more."""
        self._free += reversed(self.known.forget_all())

    def check_invariants(self) -> None:
        """Free pages, those that rest and counted pages partition the pool."""
        self.known.check_invariants()
        free, resting = set(self._free), set(self.known.resting)
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & self.known.hashes.keys(), "a page is known, and may be written"
        free |= resting
        assert NULL_PAGE not in free and self._ref_counts[NULL_PAGE] == 0, "NULL_PAGE was handed out"
        for page_id in range(1, self.num_pages):
            assert (self._ref_counts[page_id] == 0) == (page_id in free), (
                f"page {page_id} is both free and held, or neither"
            )
