"""Swapping without jax: groups leave the pool and come back with all that they shared; and when they do not swap."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_device import (
    BeamPoolModel,
    PoolModel,
    make_group,
    make_scheduler,
    make_search,
    most_pages_of,
    run_all,
    run_searches,
)

from jaxpaged.config import PreemptionConfig
from jaxpaged.host.pages.block_table import BlockTable, append_slots, fork, truncate
from jaxpaged.host.pages.page_allocator import PageAllocator
from jaxpaged.host.pages.swap import is_swap_cheaper, load, unload
from jaxpaged.host.pages.token_tree import plan_placements
from jaxpaged.host.sequence import Sequence

SWAP = PreemptionConfig("swap", swap_pages=1000)


def tables_over_shared_pages(allocator):
    """Two full pages and a part-filled one for the first, of which the second shares the full ones."""
    first = BlockTable()
    append_slots([first], [5], allocator)
    second = fork(first, allocator)
    append_slots([second], [1], allocator)
    return first, second


def test_a_shared_page_goes_once_and_comes_back_shared():
    allocator = PageAllocator(num_pages=9, page_size=2)
    first, second = tables_over_shared_pages(allocator)
    assert (list(first.pages), list(second.pages)) == ([1, 2, 3], [1, 2, 4])
    assert unload([first, second], allocator) == [1, 2, 3, 4]
    assert allocator.num_used == 0 and (first.num_slots, second.num_slots) == (5, 6)
    other = BlockTable()
    append_slots([other], [4], allocator)  # takes pages 1 and 2, which were freed last
    assert list(other.pages) == [1, 2]
    assert load([first, second], allocator) == [3, 4, 5, 6]
    assert (list(first.pages), list(second.pages)) == ([3, 4, 5], [3, 4, 6])
    assert [allocator.ref_count(page) for page in range(1, 7)] == [1, 1, 2, 2, 1, 1]


actions = st.lists(st.tuples(st.sampled_from("aft"), st.integers(0, 9), st.integers(0, 7)), max_size=30)


@settings(max_examples=100, deadline=None)
@given(actions, st.integers(1, 4), st.integers(0, 20))
def test_tables_contents_and_sharing_survive_a_swap(actions, page_size, num_taken):
    """After any program of append, fork and truncate, and other pages than before."""
    allocator = PageAllocator(1000, page_size)
    tables = [BlockTable()]
    for action, i, amount in actions:
        table = tables[i % len(tables)]
        if action == "a":
            append_slots([table], [amount], allocator)
        elif action == "f":
            tables.append(fork(table, allocator))
        else:
            truncate(table, min(amount, table.num_slots), allocator)
    before = [(table.pages[:], table.num_slots) for table in tables]
    counts = {page: allocator.ref_count(page) for table in tables for page in table.pages}
    page_ids = unload(tables, allocator)
    assert allocator.num_used == 0 and sorted(page_ids) == sorted(counts)
    contents = {place: f"what page {page} held" for place, page in enumerate(page_ids)}
    for _ in range(num_taken):
        allocator.allocate()
    new_ids = load(tables, allocator)
    pool = {page: contents[place] for place, page in enumerate(new_ids)}
    assert allocator.num_used == num_taken + len(page_ids)
    for table, (pages, num_slots) in zip(tables, before, strict=True):
        assert table.num_slots == num_slots
        assert [pool[page] for page in table.pages] == [f"what page {page} held" for page in pages]
        assert [allocator.ref_count(page) for page in table.pages] == [counts[page] for page in pages]
    allocator.check_invariants()


def test_a_swapped_group_goes_on_where_it_was_and_recomputes_nothing():
    groups = [make_group(8, 12), make_group(8, 6, n=3)]
    outputs, plans = run_all(make_scheduler(16, preemption=SWAP), groups)
    second = groups[1]
    assert second.num_swaps == second.num_preemptions > 0
    assert second.recomputed_tokens == sum(plan.num_recomputed for plan in plans) == 0
    swaps = [swap for plan in plans for swap in plan.swaps]
    assert [swap.is_out for swap in swaps] == [True, False] * second.num_swaps
    # Four pages of the prompt once, and a page or two of each sample's own.
    assert 4 + 3 <= len(swaps[0].page_ids) <= 4 + 3 * 2
    endless, _ = run_all(make_scheduler(1000), more := [make_group(8, 12), make_group(8, 6, n=3)])
    assert [outputs[g.request_id] for g in groups] == [endless[g.request_id] for g in more]


def test_a_page_that_is_swapped_out_is_written_in_the_same_step():
    """So the order within a plan matters: swaps first, then copies and writes."""
    scheduler, pool = make_scheduler(11, preemption=SWAP), PoolModel(2)
    for group in (make_group(4, 12), make_group(4, 12)):
        scheduler.add(group)
    overwritten = set()
    while (plan := scheduler.schedule()) is not None:
        written = {row.sequence.table.pages[row.start // 2] for row in plan.rows}
        overwritten |= written & {page for swap in plan.swaps if swap.is_out for page in swap.page_ids}
        scheduler.commit(plan, pool.run(plan))
    assert overwritten


def test_a_swapped_group_comes_back_before_any_that_waits():
    groups = [make_group(4, 12), make_group(4, 12), make_group(2, 2), make_group(2, 2)]
    _, plans = run_all(make_scheduler(11, max_num_seqs=2, preemption=SWAP), groups)
    assert groups[1].num_swaps > 0
    first_seen = list(dict.fromkeys(row.group.request_id for plan in plans for row in plan.rows))
    assert first_seen == [group.request_id for group in groups]


@pytest.mark.parametrize("swap_pages", [3, 5])
def test_without_room_in_swap_space_a_group_is_recomputed(swap_pages):
    groups = [make_group(4, 12), make_group(4, 12)]
    scheduler = make_scheduler(11, preemption=PreemptionConfig("swap", swap_pages))
    _, plans = run_all(scheduler, groups)
    overflows = sum(plan.num_swap_overflows for plan in plans)
    assert groups[1].num_preemptions == groups[1].num_swaps + overflows
    assert (overflows > 0) == (swap_pages == 3) == (groups[1].recomputed_tokens > 0)
    assert scheduler.swap_space.num_free == swap_pages


def test_the_cheaper_way_is_chosen_by_pages_to_move_and_tokens_to_compute():
    group = make_group(6, 20, n=2)
    allocator = PageAllocator(100, 4)
    first = group.sequences[0]
    append_slots([first.table], [6], allocator)
    second = Sequence(1, first.token_ids[:], 6, fork(first.table, allocator))
    group.sequences.append(second)
    for sequence, token in ((first, 8), (second, 9)):
        append_slots([sequence.table], [1], allocator)
        sequence.token_ids.append(token)
    # Three pages, one of them shared; 4 + 3 + 3 tokens. A page may cost as much as 10 / 3 tokens.
    assert is_swap_cheaper(group, 4, page_cost=3.3)
    assert not is_swap_cheaper(group, 4, page_cost=3.4)


def test_auto_swaps_a_group_in_one_pool_and_recomputes_it_in_another():
    """Where pages are large, the last ones are far from full when the group gives way."""

    def preempted(page_size, page_cost):
        groups = [make_group(18, 40), make_group(8, 40)]
        way = PreemptionConfig("auto", swap_pages=1000, page_cost=page_cost)
        run_all(make_scheduler(1 + 80 // page_size, page_size, preemption=way), groups)
        return groups[1]

    small = preempted(page_size=2, page_cost=1.8)
    assert small.num_swaps == small.num_preemptions > 0
    large = preempted(page_size=20, page_cost=18)
    assert large.num_swaps == 0 < large.num_preemptions


# Beams


requests = st.lists(
    st.tuples(st.integers(1, 10), st.integers(1, 10), st.integers(1, 4), st.booleans()), min_size=1, max_size=7
)  # prompt_len, max_tokens, n or beam_width, whether it is a search
ways = st.builds(
    PreemptionConfig, st.sampled_from(["swap", "auto"]), st.integers(0, 30), st.floats(0, 4), st.integers(1, 9)
)


@settings(max_examples=80, deadline=None)
@given(requests, st.integers(1, 5), st.integers(0, 6), st.integers(1, 40), ways)
def test_every_group_ends_as_in_an_endless_pool_whatever_is_swapped(requests, page_size, spare, budget, way):
    """Every sequence reads back its own tokens in every step (PoolModel checks), and nothing leaks."""

    def groups():
        return [make_search(*r[:3]) if r[3] else make_group(r[0], r[1], n=r[2]) for r in requests]

    largest = most_pages_of(groups(), page_size)
    small = make_scheduler(1 + largest + spare, page_size, 10, budget, preemption=way)
    assert run_searches(small, groups()) == run_searches(make_scheduler(2000, page_size), groups())
    assert small.swap_space.num_free == small.swap_space.num_pages


def test_recomputed_beams_share_the_part_filled_page_that_they_shared():
    """Beams of one parent differ in their last token alone, whose KV is not there yet: nothing but the parent's tokens
    is computed."""
    group, scheduler = make_search(6, 6, 3), make_scheduler(100, page_size=4)
    scheduler.add(group)
    pool = BeamPoolModel(4)
    plan = scheduler.schedule()
    scheduler.commit(plan, pool.run(plan))  # three beams over the prompt's two pages, the second half full
    assert [list(sequence.table.pages) for sequence in group.sequences] == [[1, 2]] * 3
    assert [placement[1:3] for placement in plan_placements(group, 4)] == [(0, 6), (6, 0), (6, 0)]
    scheduler.running.clear()
    scheduler._preempt(group, plan)
    plan = scheduler.schedule()
    assert plan.is_prefill and [row.count for row in plan.rows] == [6] and plan.num_recomputed == 6
    assert [list(sequence.table.pages) for sequence in group.sequences] == [[1, 2]] * 3
    scheduler.commit(plan, pool.run(plan))
    plan = scheduler.schedule()
    pool.run(plan)
    assert len(plan.copies) == 2  # as if it had never been away
    scheduler.check_invariants()


def test_samples_share_full_pages_when_they_are_recomputed():
    """The last token of each is computed, to choose the next; so each has a last page of its own."""
    group = make_group(6, 4, n=3)
    sequences = [Sequence(i, [*range(6), 90 + i], 6) for i in range(3)]
    group.sequences = sequences
    assert [placement[1:3] for placement in plan_placements(group, 4)] == [(0, 7), (4, 3), (4, 3)]
    assert [placement[1:3] for placement in plan_placements(group, 6)] == [(0, 7), (6, 1), (6, 1)]
