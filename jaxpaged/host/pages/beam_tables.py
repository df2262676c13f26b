"""The block tables of all beams of one search as one array, so that a step of thousands costs no Python a beam.

A step's new tables are a gather by parent. Every beam has a last page of its own while that is part-filled: the first
child of a beam keeps it, a further child takes that of a beam without children, into which its parent's is copied. As
many beams have no child as there are further children, so a step takes no page but where one is full: then it takes
one a beam. All of this follows from the parents alone, so the device does the same (device/beam_tables.py), and may go
on with a step before the parents of the one before it are known here.

In the allocator the search holds each page once; a page goes back when no beam names it any more.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from jaxpaged.host.pages.block_table import BlockTable
from jaxpaged.host.pages.page_allocator import PageAllocator


class BeamTables:
    """W tables of one length.

    A step is `append` when it is planned, then `descend` when it is known which beams go on. The step behind it may
    be planned in between.
    """

    def __init__(self, pages: np.ndarray, num_slots: int, num_common: int, allocator: PageAllocator):
        """pages i32[W, n] with `num_slots` positions filled, of which the first `num_common` pages are full and are the
        same for all; each page is held once for the search. Further beams of one last page get their own by `append`.
        """
        self._allocator, self._size = allocator, allocator.page_size
        self._pages = pages
        self.num_slots = num_slots
        self.num_common = num_common
        self._held = np.unique(pages[:, num_common:])  # behind the common ones
        self._marks = np.zeros(allocator.num_pages, bool)
        self._sharing = self._find_sharing()  # places whose part-filled last page is to be replaced by a copy
        self._fresh: np.ndarray | None = None  # pages i32[W] of a step that was planned ahead
        self.copies = np.zeros((2, 0), np.int32)  # source and destination, which the next step begins with
        self.num_freed = 0  # pages, when the parents were last known
        self.num_in_flight = 0  # steps that were planned, and whose parents are not known

    @classmethod
    def fork(cls, table: BlockTable, width: int, allocator: PageAllocator) -> BeamTables:
        """`width` beams that begin with what a table holds, whose pages become theirs."""
        pages = np.tile(np.array(table.pages, np.int32), (width, 1))
        num_slots, num_common = table.num_slots, table.num_slots // allocator.page_size
        table.pages, table.num_slots = array("i"), 0
        return cls(pages, num_slots, num_common, allocator)

    @classmethod
    def gather(cls, tables: Sequence[BlockTable], num_common: int, allocator: PageAllocator) -> BeamTables:
        """Of tables that have just been written, so that each has a last page of its own; their pages become these."""
        pages, num_slots = np.array([table.pages for table in tables], np.int32), tables[0].num_slots
        seen: set[int] = set()
        for table in tables:
            allocator.release_all([page_id for page_id in table.pages if page_id in seen])
            seen.update(table.pages)
            table.pages, table.num_slots = array("i"), 0
        gathered = cls(pages, num_slots, num_common, allocator)
        gathered.num_in_flight = 1
        return gathered

    def spread(self) -> list[BlockTable]:
        """The same as tables of their own, in place of this."""
        assert not self.num_in_flight, "a step is in flight: which tables go on is not known"
        self._take_back_copies()
        tables = [BlockTable(array("i", row.tolist()), self.num_slots) for row in self.pages]
        seen: set[int] = set()
        for table in tables:
            self._allocator.share_all([page_id for page_id in table.pages if page_id in seen])
            seen.update(table.pages)
        return tables

    def _take_back_copies(self) -> None:
        """What is to be copied before the next step has not been: beams share the last page of their parent again."""
        sources = dict(zip(*self.copies[::-1].tolist(), strict=True))
        self._pages[:, -1] = [sources.get(page, page) for page in self._pages[:, -1].tolist()]
        self.copies = self.copies[:, :0]
        self._drop_unnamed()

    def _find_sharing(self) -> np.ndarray:
        """All that name a last page behind the first who does; and this one too, if others hold it."""
        if self.num_slots % self._size == 0:
            return np.zeros(0, np.intp)
        pages, firsts = np.unique(self._pages[:, -1], return_index=True)
        is_shared = np.ones(self.width, bool)
        is_shared[
            [first for first, page in zip(firsts, pages, strict=True) if self._allocator.ref_count(page) == 1]
        ] = 0
        return np.flatnonzero(is_shared)

    @property
    def width(self) -> int:
        return len(self._pages)

    @property
    def pages(self) -> np.ndarray:
        """i32[W, n]: of the last step whose parents are known, or of one planned behind it."""
        return self._pages

    @property
    def num_pages(self) -> int:
        """Pages of one table, with that of a step planned ahead."""
        return self._pages.shape[1] + (self._fresh is not None)

    @property
    def logical(self) -> int:
        return self.width * self._pages.shape[1]

    @property
    def physical(self) -> int:
        """Different pages that the tables name."""
        return self.num_common + len(self._held)

    @property
    def num_claimed(self) -> int:
        """Pages into which the next step copies others; until it is planned they are as good as free."""
        return 0 if self.num_in_flight else self.copies.shape[1]

    @property
    def num_unfilled(self) -> int:
        """Positions behind the last ones, in pages that are part-filled."""
        return (self.width - len(self._sharing) - self.num_claimed) * (-self.num_slots % self._size)

    @property
    def fresh_pages(self) -> np.ndarray:
        """i32[W]: the pages that the step planned last begins, where it begins some."""
        return self._pages[:, -1] if self._fresh is None else self._fresh

    def num_needed(self) -> int:
        """Pages that `append` takes."""
        return self.width if self.num_slots % self._size == 0 else len(self._sharing)

    def append(self) -> None:
        """Room for one more position in every table; there must be as many free pages as it takes."""
        fresh = self._allocator.allocate_many(self.num_needed())
        if self.num_slots % self._size == 0:
            self._fresh = fresh
            if not self.num_in_flight:
                self._begin_pages()
        elif len(fresh):
            assert not self.num_in_flight, "beams that share a last page cannot go on ahead"
            self._own(self._sharing, fresh)
            self._sharing = self._sharing[:0]
        self.num_slots += 1
        self.num_in_flight += 1

    def _begin_pages(self) -> None:
        assert self._fresh is not None
        self._pages = np.concatenate([self._pages, self._fresh[:, None]], axis=1)
        self._held = np.concatenate([self._held, self._fresh])
        self._fresh = None

    def _own(self, places: np.ndarray, pages: np.ndarray) -> None:
        """Give these beams other last pages, with what theirs hold."""
        copies = np.stack([self._pages[places, -1], pages]).astype(np.int32)
        self.copies = np.concatenate([self.copies, copies], axis=1)
        self._pages[places, -1] = pages
        self._held = np.concatenate([self._held, pages])
        self._drop_unnamed()

    def descend(self, parents: np.ndarray) -> None:
        """The beams of the next step: each has the table of its parent, i32[W'] of the beams until now."""
        ahead = self.num_in_flight - 1
        assert ahead in (0, 1), "descend follows append"
        assert not ahead or len(parents) == self.width, "beams that change their number cannot go on ahead"
        self.num_in_flight = ahead
        before, self.copies = self._pages, self.copies[:, :0]
        self._pages = before[parents]
        if (self.num_slots - ahead) % self._size:
            self._share_out(before[:, -1], parents)
        self.num_freed = self._drop_unnamed()
        if self._fresh is not None:
            self._begin_pages()

    def _share_out(self, last: np.ndarray, parents: np.ndarray) -> None:
        """Part-filled last pages i32[W]: the first child keeps its parent's, others take those that have no child."""
        places = np.arange(len(parents))
        first = np.full(len(last), len(parents))
        first[parents[::-1]] = places[::-1]
        further, childless = np.flatnonzero(first[parents] != places), np.flatnonzero(first == len(parents))
        served = further[: len(childless)]
        targets = last[childless[: len(served)]]
        self.copies = np.stack([self._pages[served, -1], targets]).astype(np.int32)
        self._pages[served, -1] = targets
        self._sharing = further[len(childless) :]

    def _drop_unnamed(self) -> int:
        """Give back what no table names any more; returns how many pages became free."""
        marks, held = self._marks, self._held
        named = self._pages[:, self.num_common :]
        marks[named] = True
        is_named = marks[held]
        freed = self._allocator.release_all(held[~is_named].tolist())
        self._held = held[is_named]
        marks[self._held] = False
        return freed

    def release(self) -> int:
        """The search is over: give all pages back; returns how many became free."""
        fresh = [] if self._fresh is None else self._fresh.tolist()
        freed = self._allocator.release_all([*self._pages[0, : self.num_common].tolist(), *self._held.tolist(), *fresh])
        self._pages, self._held, self._fresh, self.num_common = self._pages[:0], self._held[:0], None, 0
        self.num_in_flight = 0
        return freed

    def as_table(self) -> BlockTable:
        """All pages, each once, as one table. For tests of who holds what."""
        fresh = [] if self._fresh is None else self._fresh.tolist()
        pages = [*self._pages[0, : self.num_common].tolist(), *self._held.tolist(), *fresh]
        return BlockTable(array("i", pages), len(pages) * self._size)
