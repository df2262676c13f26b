"""Which pages of the pool are free, and how many block tables hold each of the others."""

from __future__ import annotations

from collections.abc import Sequence

from jaxpaged.step_io import NULL_PAGE


class OutOfPagesError(RuntimeError):
    """More pages were asked for than are free. Nothing was allocated."""


class PageAllocator:
    """A free list and reference counts over page ids 1 .. num_pages - 1; NULL_PAGE is never handed out.

    The free list is a stack: the page released last is handed out first, so a small working set stays small.
    """

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))
        self._ref_counts = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - 1 - len(self._free)

    @property
    def largest_free(self) -> int:
        """Free pages that a table can take together: all, since pages may lie anywhere."""
        return len(self._free)

    def ref_count(self, page_id: int) -> int:
        return self._ref_counts[page_id]

    @property
    def ref_counts(self) -> Sequence[int]:
        """Of every page, for who looks at many."""
        return self._ref_counts

    def allocate(self) -> int:
        """A free page, with one reference."""
        if not self._free:
            raise OutOfPagesError(f"all {self.num_pages - 1} pages are in use")
        page_id = self._free.pop()
        self._ref_counts[page_id] = 1
        return page_id

    def share(self, page_id: int) -> None:
        """One more table holds this page."""
        assert self._ref_counts[page_id] > 0, f"page {page_id} is free and cannot be shared"
        self._ref_counts[page_id] += 1

    def release(self, page_id: int) -> bool:
        """One table fewer holds this page; True if it is now free."""
        assert self._ref_counts[page_id] > 0, f"page {page_id} is released twice"
        self._ref_counts[page_id] -= 1
        if self._ref_counts[page_id] == 0:
            self._free.append(page_id)
            return True
        return False

    def share_all(self, page_ids: Sequence[int]) -> None:
        """`share` each of them."""
        ref_counts = self._ref_counts
        for page_id in page_ids:
            assert ref_counts[page_id] > 0, f"page {page_id} is free and cannot be shared"
            ref_counts[page_id] += 1

    def release_all(self, page_ids: Sequence[int]) -> int:
        """`release` each of them, the last first; returns how many became free.

        In reverse, because the free list is a stack: the pages that are needed soonest come back first.
        """
        ref_counts, freed = self._ref_counts, 0
        for page_id in reversed(page_ids):
            assert ref_counts[page_id] > 0, f"page {page_id} is released twice"
            ref_counts[page_id] -= 1
            if ref_counts[page_id] == 0:
                self._free.append(page_id)
                freed += 1
        return freed

    def check_invariants(self) -> None:
        """Free pages and counted pages partition the pool."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        assert NULL_PAGE not in free and self._ref_counts[NULL_PAGE] == 0, "NULL_PAGE was handed out"
        for page_id in range(1, self.num_pages):
            assert (self._ref_counts[page_id] == 0) == (page_id in free), (
                f"page {page_id} is both free and held, or neither"
            )
