"""The account of token slots, held to a count of the slots themselves."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_device import PoolModel, make_group

from jaxpaged.config import KV_CACHES, CacheConfig, EngineConfig, PreemptionConfig
from jaxpaged.host.account.accounting import RunStats
from jaxpaged.host.account.memory_account import CATEGORIES
from jaxpaged.host.scheduler import Scheduler


def run_counting(scheduler: Scheduler, groups) -> tuple[RunStats, dict[str, list[int]]]:
    """Run to the end, and count in every step, from the tables alone, what the account should say of it."""
    stats, pool = (
        RunStats.for_cache(scheduler.cache),
        PoolModel(scheduler.cache.page_size, scheduler.limits.kv_cache != "none"),
    )
    counted: dict[str, list[int]] = {name: [] for name in ("used", "physical", "logical")}
    for group in groups:
        scheduler.add(group)
    while (plan := scheduler.schedule()) is not None:
        stats.record(plan, scheduler)
        tables = [s.table for group in scheduler.running for s in group.unfinished]
        slots = {(t.pages[i // pool.page_size], i % pool.page_size) for t in tables for i in range(t.num_slots)}
        counted["used"].append(len(slots))
        counted["physical"].append(len({page for table in tables for page in table.pages}))
        counted["logical"].append(sum(len(table.pages) for table in tables))
        scheduler.commit(plan, pool.run(plan))
    return stats, counted


def total(memory) -> np.ndarray:
    return sum(getattr(memory, name) for name in CATEGORIES)


def test_a_paged_request_wastes_the_end_of_its_last_page():
    scheduler = Scheduler(CacheConfig(4, 9), EngineConfig(100))
    memory = run_counting(scheduler, [make_group(5, 3)])[0].memory
    assert memory.used.tolist() == [5, 6, 7]
    assert memory.internal.tolist() == [3, 2, 1]
    assert memory.free.tolist() == [24, 24, 24] and memory.num_slots == 32
    assert not memory.reserved.any() and not memory.rounding.any() and not memory.gaps.any()


def test_a_reservation_is_split_in_hindsight_into_what_was_used_later_and_what_never_was():
    scheduler = Scheduler(CacheConfig(4, 17), EngineConfig(32, kv_cache="contiguous-pow2"))
    group = make_group(5, 12, stop_token_ids=[8])  # tokens are 6, 7, 8: it ends at the third
    memory = run_counting(scheduler, [group])[0].memory
    assert memory.used.tolist() == [5, 6, 7]
    assert memory.reserved.tolist() == [3, 2, 1]  # up to 8 tokens, prompt and output
    assert memory.internal.tolist() == [13, 13, 13]  # of 5 + 16 that were asked for
    assert memory.rounding.tolist() == [11, 11, 11]  # 21 tokens are 6 pages, which are rounded up to 8
    assert memory.free.tolist() == [32, 32, 32]


def test_free_slots_are_stranded_while_a_request_waits_for_a_larger_piece():
    scheduler = Scheduler(CacheConfig(4, 14), EngineConfig(32, kv_cache="contiguous-max"))
    memory = run_counting(scheduler, [make_group(5, 2), make_group(5, 2)])[0].memory
    assert memory.free.tolist() == [20] * 4  # pages 9 to 13: pieces of 4 and 1, and a request takes 8
    assert memory.stranded.tolist() == [20, 20, 0, 0]
    assert memory.gaps.tolist() == [4] * 4
    assert memory.external.tolist() == [20] * 4


def test_a_run_that_is_left_early_counts_as_if_its_requests_ended_then():
    scheduler = Scheduler(CacheConfig(4, 17), EngineConfig(32, kv_cache="contiguous-oracle"))
    stats, pool = RunStats.for_cache(scheduler.cache), PoolModel(4)
    scheduler.add(make_group(5, 12))
    for _ in range(3):
        plan = scheduler.schedule()
        stats.record(plan, scheduler)
        scheduler.commit(plan, pool.run(plan))
    assert stats.memory.reserved.tolist() == [2, 1, 0] and stats.memory.internal.tolist() == [10, 10, 10]


requests = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4)), min_size=1, max_size=8)
SWAP = PreemptionConfig("swap", swap_pages=1000)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(KV_CACHES), requests, st.integers(1, 5), st.integers(0, 12), st.integers(1, 40),
    st.sampled_from([SWAP, PreemptionConfig()]),
)  # fmt: skip
def test_every_slot_is_in_one_category_at_every_step(kv_cache, requests, page_size, spare, budget, preemption):
    groups = [make_group(*request) for request in requests]
    largest = 4 * (1 << (-(-32 // page_size) - 1).bit_length())
    scheduler = Scheduler(
        CacheConfig(page_size, largest + 1 + spare),
        EngineConfig(32, 6, budget if kv_cache != "none" else 100, preemption=preemption, kv_cache=kv_cache),
    )
    stats, counted = run_counting(scheduler, groups)
    memory = stats.memory
    assert (total(memory) == memory.num_slots).all()
    assert all((getattr(memory, name) >= 0).all() for name in (*CATEGORIES, "gaps", "stranded"))
    assert memory.used.tolist() == counted["used"]
    assert memory.physical_pages.tolist() == counted["physical"]
    assert memory.logical_pages.tolist() == counted["logical"]
    assert memory.copied_pages.sum() == stats.page_copies == sum(group.pages.copied for group in groups)
    assert memory.swapped_out_pages.sum() == memory.swapped_in_pages.sum()
    if kv_cache == "contiguous-oracle":
        assert not memory.internal.any()  # the outputs have the length that was known
