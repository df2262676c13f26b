"""Pages that no window reaches: given back while their sequences go on, and nobody gets another token for it."""

from __future__ import annotations

from array import array

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_device import PoolModel, begin, make_group, make_scheduler, run_ahead, run_all
from test_prefix_cache import calls, request, run_calls, stems, ways

from jaxpaged.config import PreemptionConfig
from jaxpaged.host.account.accounting import RunStats
from jaxpaged.host.account.memory_account import CATEGORIES
from jaxpaged.host.pages.block_table import BlockTable, append_slots, fork, refork
from jaxpaged.host.pages.page_allocator import PageAllocator
from jaxpaged.host.pages.window import PageWindow
from jaxpaged.host.sequence import Sequence, SequenceStatus


def test_a_table_names_null_page_where_nothing_is_read_any_more():
    allocator, table = PageAllocator(10, 4), BlockTable()
    window = PageWindow(6, 64, allocator)
    append_slots([table], [16], allocator)
    assert window.give_back(table, 8) == 0  # position 8 reads 3 to 8
    assert window.give_back(table, 9) == 1  # 4 to 9
    assert (list(table.pages), table.num_gone, allocator.num_free) == ([0, 2, 3, 4], 1, 6)
    other = fork(table, allocator)
    assert (window.give_back(table, 13), allocator.num_free) == (0, 6)  # the other holds page 2
    assert (window.give_back(other, 13), allocator.num_free) == (1, 7)
    assert window.least_pages == 3  # of position 7: 2 to 7


def test_tables_of_which_all_pages_in_common_are_gone_have_nothing_in_common():
    allocator, tables = PageAllocator(10, 2), [BlockTable(), BlockTable()]
    append_slots(tables, [6, 6], allocator)
    for table in tables:
        PageWindow(3, 64, allocator).give_back(table, 6)
    assert [list(table.pages) for table in tables] == [[0, 0, 3], [0, 0, 6]]
    assert refork(tables[1], tables[0], allocator) == (0, 1)
    assert list(tables[1].pages) == [0, 0, 3] and allocator.ref_count(3) == 2


def test_a_generation_longer_than_the_pool_holds_its_window_alone():
    scheduler = make_scheduler(4, page_size=2, window=5)
    group = make_group(3, max_tokens=60)
    done, _ = run_ahead(scheduler, [group])
    assert len(done[group.request_id][0]) == 60
    assert (group.pages.physical_at_peak, group.pages.logical_at_peak, group.num_preemptions) == (3, 3, 0)


def test_a_prompt_longer_than_the_pool_moves_on_by_what_it_gives_back():
    scheduler = make_scheduler(7, page_size=2, window=5, max_num_batched_tokens=16)
    group = make_group(40, max_tokens=3)
    done, plans = run_all(scheduler, [group])
    chunks = [(row.start, row.count) for plan in plans for row in plan.rows]
    # Six pages: of the first 12 positions; then two stay, of positions 8 to 11, since 12 reads from 8 on.
    assert chunks == [(0, 12), (12, 8), (20, 8), (28, 8), (36, 4), (40, 1), (41, 1)]
    assert len(done[group.request_id][0]) == 3 and group.pages.physical_at_peak == 6


def test_a_request_whose_window_does_not_fit_is_refused_and_samples_must_fit_whole():
    scheduler = make_scheduler(4, page_size=2, window=6)
    for group in make_group(30), make_group(3, max_tokens=20, n=2):
        try:
            scheduler.add(group)
        except ValueError as error:
            assert "pages of 2 tokens, the pool has 3: raise num_pages" in str(error)
        else:
            raise AssertionError("it was not refused")
    run_all(make_scheduler(5, page_size=2, window=6), [make_group(30)])


def test_what_a_moving_prompt_takes_back_is_not_taken_by_those_who_begin_alike():
    scheduler = make_scheduler(30, page_size=1, window=9, max_num_batched_tokens=16, prefix_caching=True)
    long = request("long", range(1, 32), 2)
    done, _ = run_all(scheduler, [long, request("short", [*range(1, 9), 99], 2)])
    assert {name: len(tokens) for name, (tokens,) in done.items()} == {"long": 2, "short": 2}


def test_a_prompt_comes_again_to_a_pool_without_room_for_what_it_finds():
    scheduler = make_scheduler(7, page_size=1, window=5, prefix_caching=True)
    for _ in range(2):
        done, _ = run_all(scheduler, [request("again", range(1, 21), 2)])
        assert len(done["again"][0]) == 2


def test_a_later_turn_finds_the_last_window_though_the_beginning_is_lost():
    scheduler = make_scheduler(8, page_size=2, window=5, prefix_caching=True)
    first = request("first", range(1, 31), 4)
    run_all(scheduler, [first])
    turn = [*first.sequences[0].token_ids, 7, 8]
    scheduler.add(second := request("second", turn, 2))
    assert scheduler.schedule().rows[0].start == second.cached_tokens == 32  # 33 tokens were in pages


def test_pages_are_found_as_far_as_all_that_is_read_behind_them_is_known():
    allocator = PageAllocator(10, 2, prefix_caching=True)
    window, ids = PageWindow(5, 64, allocator), array("i", range(12))
    allocator.known.add([0, 0, 3, 4, 0, 6], ids, [], 0, 6)
    assert allocator.known.find(ids, [], 6) == []
    assert allocator.known.find_last(ids, [], 6, window.num_unread) == [0, 0, 3, 4]
    assert allocator.known.find_last(ids, [], 3, window.num_unread) == []  # position 6 reads page 1


def test_samples_that_share_find_nothing_of_which_a_part_is_gone():
    scheduler = make_scheduler(20, page_size=2, window=3, prefix_caching=True)
    group = request("two", range(1, 10), 4, n=2)
    scheduler.allocator.known.add([0, 0, 3, 4], array("i", range(1, 10)), [], 0, 4)
    assert scheduler._known.find(group, group.sequences[0]) == [0, 0, 0, 4]
    group.sequences.append(Sequence(1, [*range(1, 10)], 9, status=SequenceStatus.WAITING))
    assert scheduler._known.find(group, group.sequences[0]) == []


def test_the_account_counts_what_was_given_back_as_free():
    scheduler = make_scheduler(41, page_size=2, window=5)
    stats = RunStats.for_cache(scheduler.cache)
    begin(scheduler, [make_group(3, max_tokens=30, n=2)])
    pool = PoolModel(2, window=5)
    while (plan := scheduler.schedule()) is not None:
        stats.record(plan, scheduler)
        scheduler.commit(plan, pool.run(plan))
    memory = stats.memory
    assert set(sum(getattr(memory, name) for name in CATEGORIES)) == {80}
    assert stats.pages_used.max() == 6 and memory.logical_pages.max() == 6
    assert memory.used.max() == 12 and memory.internal.max() <= 2


def test_who_gives_way_takes_its_window_to_host_memory_and_back():
    way = PreemptionConfig("swap", swap_pages=100, transfer_pages=4)
    scheduler = make_scheduler(8, page_size=2, window=7, preemption=way)
    groups = [make_group(3, max_tokens=30), make_group(3, max_tokens=30)]
    done, plans = run_all(scheduler, groups)
    assert sorted(len(tokens) for (tokens,) in done.values()) == [30, 30]
    swaps = [len(one.page_ids) for plan in plans for one in plan.swaps]
    assert swaps and max(swaps) <= 4


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    calls, st.lists(stems, min_size=1, max_size=3), st.sampled_from([0, 0, 3, 8]), st.integers(1, 4),
    st.integers(0, 12), st.integers(1, 40), ways, st.booleans(), st.booleans(), st.sampled_from([1, 2, 3, 5, 8, 13]),
)  # fmt: skip
def test_random_calls_get_the_tokens_that_they_get_with_all_pages(
    all_calls, stem_list, prefix_len, page_size, spare, budget, preemption, mixed, caching, window
):
    """Small pools, in which requests are longer than the pool; who reads a position within its window reads what its
    own tokens say, and pages that are free hold nothing of use."""
    arguments = all_calls, stem_list, prefix_len, page_size, spare, budget, preemption, mixed
    with_window, _ = run_calls(*arguments, caching, window)
    assert with_window == run_calls(*arguments, caching=False)[0]
