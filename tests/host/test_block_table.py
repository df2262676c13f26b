"""Allocator and tables: worked examples of the paper, and a state machine that reads every sequence back."""

from array import array

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jaxpaged.host.pages.block_table import (
    BlockTable,
    PageCopy,
    append_slots,
    fork,
    num_pages_for,
    num_pages_needed,
    refork,
    release,
    truncate,
)
from jaxpaged.host.pages.page_allocator import OutOfPagesError, PageAllocator


def scripted_allocator(free: list[int], num_pages: int, page_size: int) -> PageAllocator:
    """Hands out `free` in this order (examples of the paper name physical pages)."""
    allocator = PageAllocator(num_pages, page_size)
    allocator._free = free[::-1]
    return allocator


def test_paper_figure_6_decoding_fills_the_last_page_before_taking_another():
    allocator = scripted_allocator([7, 1, 3], num_pages=9, page_size=4)
    table = BlockTable()
    append_slots([table], [7], allocator)  # "Four score and seven years ago our"
    assert (list(table.pages), table.num_slots) == ([7, 1], 7)
    append_slots([table], [1], allocator)  # "fathers": the eighth slot, no new page
    assert (list(table.pages), table.num_slots) == ([7, 1], 8)
    append_slots([table], [1], allocator)  # "brought"
    assert (list(table.pages), table.num_slots) == ([7, 1, 3], 9)


def test_paper_figure_8_two_samples_share_the_prompt_and_the_first_writer_copies():
    allocator = scripted_allocator([7, 1, 3], num_pages=9, page_size=4)
    first = BlockTable()
    append_slots([first], [7], allocator)
    second = fork(first, allocator)
    assert [allocator.ref_count(page) for page in (7, 1)] == [2, 2]
    assert append_slots([first], [1], allocator) == [PageCopy(1, 3)]
    assert (list(first.pages), list(second.pages)) == ([7, 3], [7, 1])
    assert allocator.ref_count(1) == 1
    assert append_slots([second], [1], allocator) == []  # alone on page 1 now: in place
    assert list(second.pages) == [7, 1]


@pytest.mark.parametrize(("prompt_len", "copies"), [(6, 3), (8, 0)])
def test_n_children_cost_n_minus_1_copies_of_a_part_filled_last_page_and_none_of_a_full_one(prompt_len, copies):
    allocator = PageAllocator(32, 4)
    tables = [BlockTable()]
    append_slots(tables, [prompt_len], allocator)
    tables += [fork(tables[0], allocator) for _ in range(3)]
    assert len(append_slots(tables, [1] * 4, allocator)) == copies
    assert append_slots(tables, [1] * 4, allocator) == []


def test_a_table_that_forks_anew_gives_back_only_what_its_new_parent_does_not_have():
    allocator = PageAllocator(num_pages=9, page_size=2)
    parent = BlockTable()
    append_slots([parent], [4], allocator)
    other = fork(parent, allocator)
    append_slots([parent, other], [2, 4], allocator)
    assert (list(parent.pages), list(other.pages)) == ([1, 2, 3], [1, 2, 4, 5])
    assert refork(other, parent, allocator) == (2, 2)  # two pages in common; two became free
    assert (list(other.pages), other.num_slots) == ([1, 2, 3], 6)
    assert [allocator.ref_count(page) for page in range(1, 6)] == [2, 2, 2, 0, 0]


def test_append_is_all_or_nothing():
    allocator = PageAllocator(num_pages=4, page_size=2)
    tables = [BlockTable(), BlockTable()]
    append_slots(tables, [2, 2], allocator)
    with pytest.raises(OutOfPagesError, match="2 pages are needed, 1 are free"):
        append_slots(tables, [1, 1], allocator)
    assert [list(table.pages) for table in tables] == [[1], [2]]
    assert allocator.num_free == 1


def test_copies_are_counted_before_any_page_is_taken():
    allocator = PageAllocator(num_pages=4, page_size=2)
    parent = BlockTable()
    append_slots([parent], [1], allocator)
    children = [parent, fork(parent, allocator), fork(parent, allocator)]
    assert num_pages_needed(children, [1, 1, 1], allocator) == 2  # the last one writes in place
    assert num_pages_needed(children[:2], [1, 1], allocator) == 2  # the third still reads the old page


def test_a_released_table_gives_its_first_page_out_first():
    allocator = PageAllocator(num_pages=6, page_size=1)
    table = BlockTable()
    append_slots([table], [3], allocator)
    assert release(table, allocator) == 3
    append_slots([table], [3], allocator)
    assert list(table.pages) == [1, 2, 3]


def append_counted(tables, counts, allocator):
    """`append_slots`, which takes as many pages as were counted before."""
    needed, free = num_pages_needed(tables, counts, allocator), allocator.num_free
    copies = append_slots(tables, counts, allocator)
    assert allocator.num_free == free - needed
    return copies


class TablesAgainstAModel(RuleBasedStateMachine):
    """Any program of open, append, fork, refork, truncate and release; a dict plays the pool, tokens play the KV.

    Reading every sequence back is what finds a missing copy-on-write: counts alone would not.
    """

    append_slots = staticmethod(append_counted)

    @initialize(page_size=st.integers(1, 5), num_pages=st.integers(2, 24))
    def start(self, page_size, num_pages):
        self.allocator = PageAllocator(num_pages, page_size)
        self.pool: dict[tuple[int, int], int] = {}  # (page, offset) -> token
        self.tables: list[BlockTable] = []
        self.contents: list[list[int]] = []
        self.next_token = 0

    def _write(self, table: BlockTable, start: int, count: int) -> list[int]:
        tokens = list(range(self.next_token, self.next_token + count))
        self.next_token += count
        for position, token in enumerate(tokens, start):
            page, offset = divmod(position, self.allocator.page_size)
            self.pool[table.pages[page], offset] = token
        return tokens

    @rule()
    def open(self):
        self.tables.append(BlockTable())
        self.contents.append([])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def append(self, data):
        """Several tables at once, by different amounts, as a step does."""
        chosen = data.draw(st.lists(st.integers(0, len(self.tables) - 1), unique=True, min_size=1))
        counts = [data.draw(st.integers(0, 7)) for _ in chosen]
        tables = [self.tables[i] for i in chosen]
        before = [(list(table.pages), table.num_slots) for table in tables]
        needed, free = num_pages_needed(tables, counts, self.allocator), self.allocator.num_free
        try:
            copies = self.append_slots(tables, counts, self.allocator)
        except OutOfPagesError:
            assert needed > free
            assert [(list(table.pages), table.num_slots) for table in tables] == before
            return
        snapshot = dict(self.pool)  # all copies of a step read before any writes
        for src, dst in copies:
            for offset in range(self.allocator.page_size):
                if (src, offset) in snapshot:
                    self.pool[dst, offset] = snapshot[src, offset]
        for i, count in zip(chosen, counts, strict=True):
            self.contents[i] += self._write(self.tables[i], len(self.contents[i]), count)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data):
        i = data.draw(st.integers(0, len(self.tables) - 1))
        free = self.allocator.num_free
        self.tables.append(fork(self.tables[i], self.allocator))
        self.contents.append(list(self.contents[i]))
        assert self.allocator.num_free == free

    @precondition(lambda self: len(self.tables) > 1)
    @rule(data=st.data())
    def refork(self, data):
        i, j = data.draw(st.lists(st.integers(0, len(self.tables) - 1), min_size=2, max_size=2, unique=True))
        free = self.allocator.num_free
        common, freed = refork(self.tables[i], self.tables[j], self.allocator)
        assert self.allocator.num_free == free + freed
        shorter = min(common * self.allocator.page_size, len(self.contents[i]), len(self.contents[j]))
        assert self.contents[i][:shorter] == self.contents[j][:shorter]
        self.contents[i] = list(self.contents[j])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def truncate(self, data):
        i = data.draw(st.integers(0, len(self.tables) - 1))
        length = data.draw(st.integers(0, len(self.contents[i])))
        freed_before = self.allocator.num_free
        freed = truncate(self.tables[i], length, self.allocator)
        assert self.allocator.num_free == freed_before + freed
        del self.contents[i][length:]

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data):
        i = data.draw(st.integers(0, len(self.tables) - 1))
        release(self.tables.pop(i), self.allocator)
        del self.contents[i]

    @invariant()
    def counts_equal_table_entries_and_pages_partition_the_pool(self):
        self.allocator.check_invariants()
        held = array("i")
        for table, tokens in zip(self.tables, self.contents, strict=True):
            assert table.num_slots == len(tokens)
            assert len(table.pages) == num_pages_for(len(tokens), self.allocator.page_size)
            held += table.pages
        for page in range(1, self.allocator.num_pages):
            assert self.allocator.ref_count(page) == held.count(page)

    @invariant()
    def every_sequence_reads_back_its_own_tokens(self):
        size = self.allocator.page_size
        for table, tokens in zip(self.tables, self.contents, strict=True):
            assert [self.pool[table.pages[p // size], p % size] for p in range(len(tokens))] == tokens


TestTablesAgainstAModel = TablesAgainstAModel.TestCase
TestTablesAgainstAModel.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


FIND_ONE = settings(max_examples=500, database=None, deadline=None, phases=[Phase.generate])


def test_the_state_machine_finds_a_missing_copy_on_write(monkeypatch):
    """With the copy planted out (every last page taken for unshared), reading back must fail: the test can fail."""

    def append_in_place(tables, counts, allocator):
        with monkeypatch.context() as patch:
            patch.setattr(PageAllocator, "ref_counts", property(lambda self: [1] * self.num_pages))
            return append_slots(tables, counts, allocator)

    class WithoutCopyOnWrite(TablesAgainstAModel):
        append_slots = staticmethod(append_in_place)

    with pytest.raises(AssertionError):
        run_state_machine_as_test(WithoutCopyOnWrite, settings=FIND_ONE)
