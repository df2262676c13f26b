"""Tables of a search as one array: beams read their own tokens, and no page is lost, whatever beams go on."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpaged.host.pages.beam_tables import BeamTables
from jaxpaged.host.pages.block_table import BlockTable, append_slots, fork, release
from jaxpaged.host.pages.page_allocator import OutOfPagesError, PageAllocator


def prompt_table(allocator: PageAllocator, length: int) -> BlockTable:
    table = BlockTable(array("i"))
    append_slots([table], [length], allocator)
    return table


class Pool:
    """What the slots of a pool hold."""

    def __init__(self, page_size: int):
        self.size = page_size
        self.slots: dict[tuple[int, int], int] = {}

    def copy(self, copies: np.ndarray) -> None:
        before = dict(self.slots)
        for src, dst in copies.T.tolist():
            for offset in range(self.size):
                self.slots[dst, offset] = before.get((src, offset), -1)

    def write(self, pages: np.ndarray, position: int, tokens: list[int]) -> None:
        for page, token in zip(pages[:, position // self.size].tolist(), tokens, strict=True):
            self.slots[page, position % self.size] = token

    def read(self, pages: np.ndarray, length: int) -> list[list[int]]:
        return [[self.slots[row[i // self.size], i % self.size] for i in range(length)] for row in pages.tolist()]


@settings(max_examples=40, deadline=None)
@given(
    prompt_len=st.integers(1, 9), widths=st.lists(st.integers(1, 6), min_size=1, max_size=3), others=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_every_beam_reads_its_own_tokens_and_every_page_is_held_once(prompt_len, widths, others, seed):
    """`others`: another table holds the prompt. Widths change now and then."""
    rng, size = np.random.default_rng(seed), 4
    allocator, pool = PageAllocator(200, size), Pool(size)
    prompt = prompt_table(allocator, prompt_len)
    contents = [list(range(prompt_len))]
    for position in range(prompt_len):
        pool.write(np.array([prompt.pages]), position, [position])
    other = fork(prompt, allocator) if others else None
    tables = BeamTables.fork(prompt, widths[0], allocator)
    contents = [contents[0][:] for _ in range(widths[0])]
    for step in range(14):
        needed, free = tables.num_needed(), allocator.num_free
        tables.append()
        assert allocator.num_free == free - needed
        pool.copy(tables.copies)
        tokens = rng.integers(100, 999, tables.width).tolist()
        pool.write(tables.pages, prompt_len + step, tokens)
        for content, token in zip(contents, tokens, strict=True):
            content.append(token)
        assert pool.read(tables.pages, prompt_len + step + 1) == contents
        last = tables.pages[:, -1]
        assert len(set(last.tolist())) == len(last), "two beams write to one page"
        parents = rng.integers(0, tables.width, widths[step // 5 % len(widths)])
        tables.descend(parents)
        contents = [contents[parent][:] for parent in parents]
        assert tables.physical == len(set(tables.pages.ravel().tolist()))
        assert allocator.num_used == len({*tables.pages.ravel().tolist(), *(other.pages if other else [])})
        allocator.check_invariants()
    tables.release()
    if other is not None:
        assert pool.read(np.array([other.pages]), prompt_len) == [list(range(prompt_len))]
        release(other, allocator)
    assert allocator.num_used == 0


@pytest.mark.parametrize("prompt_len", [3, 4, 6])
def test_a_step_that_is_planned_ahead_gives_the_same_tables(prompt_len):
    rng = np.random.default_rng(prompt_len)
    tables = []
    for _ in range(2):
        allocator = PageAllocator(300, 4)
        tables.append(BeamTables.fork(prompt_table(allocator, prompt_len), 5, allocator))
    waits, ahead = tables
    waits.append()
    ahead.append()
    for _ in range(20):
        parents = rng.integers(0, 5, 5)
        waits.descend(parents)
        waits.append()
        ahead.append()
        ahead.descend(parents)
        names: dict[int, int] = {}  # page ids differ, since pages are free later
        assert ahead.num_slots == waits.num_slots and ahead.copies.shape == waits.copies.shape
        for one, other in zip(waits.pages.ravel().tolist(), ahead.pages.ravel().tolist(), strict=True):
            assert names.setdefault(one, other) == other
        assert len(set(names.values())) == len(names)


def test_tables_are_spread_and_gathered_with_what_they_share():
    allocator = PageAllocator(100, 4)
    tables = BeamTables.fork(prompt_table(allocator, 6), 3, allocator)
    tables.append()
    tables.descend(np.array([2, 1, 1]))
    expected, used = tables.pages.tolist(), allocator.num_used
    ((source,), (target,)) = tables.copies.tolist()
    assert [row[-1] for row in expected][1:] == [source, target] and tables.num_claimed == 1
    expected[2][-1] = source  # the copy is not made: the beam shares its parent's page, and the other one is free
    spread = tables.spread()
    assert [list(table.pages) for table in spread] == expected and allocator.num_used == used - 1
    assert allocator.ref_count(expected[0][0]) == 3 and allocator.ref_count(source) == 2
    append_slots(spread, [1] * 3, allocator)
    written = [list(table.pages) for table in spread]
    again = BeamTables.gather(spread, 1, allocator)
    assert again.pages.tolist() == written and allocator.ref_count(expected[0][0]) == 1
    again.release()
    assert allocator.num_used == 0


def test_as_many_pages_as_are_free_or_none():
    allocator = PageAllocator(6, 4)
    assert allocator.allocate_many(3).tolist() == [1, 2, 3]
    with pytest.raises(OutOfPagesError, match="3 pages are needed, 2 are free"):
        allocator.allocate_many(3)
    assert allocator.num_free == 2
