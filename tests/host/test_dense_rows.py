"""Dense systems by their schedules: rows taken one by one, batches that begin and end as a whole, and no cache."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_device import PoolModel, make_group, run_all
from test_memory_account import run_counting, total

from jaxpaged.config import DENSE_CACHES, CacheConfig, EngineConfig
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.study.simulate import PAPER_POOL, Simulation, paper_limits
from jaxpaged.study.workloads import make_workload


def make_scheduler(kv_cache, num_pages=9, page_size=4, max_model_len=16, **limits) -> Scheduler:
    """By default the pool holds two dense rows of four pages."""
    return Scheduler(CacheConfig(page_size, num_pages), EngineConfig(max_model_len, kv_cache=kv_cache, **limits))


def shapes(plans) -> list[tuple[bool, int, int]]:
    """Of every step: whether it is prefill, rows, and rows that compute for nobody."""
    return [(plan.is_prefill, len(plan.rows), plan.num_idle_rows) for plan in plans]


def test_the_pool_holds_as_many_dense_rows_as_fit_and_the_rest_stays_free():
    stats = Simulation(make_workload("sharegpt", 40), PAPER_POOL, paper_limits("dense")).run()
    assert stats.running.max() == 7  # 15,728 tokens are seven rows of 2,048 and a tail of 1,392
    assert stats.memory.free.min() == 1392 and not stats.memory.rounding.any()


def test_a_dense_row_is_taken_again_in_the_step_after_its_sequence_ends():
    _, plans = run_all(make_scheduler("dense"), [make_group(3, 2), make_group(3, 4), make_group(3, 2)])
    assert shapes(plans) == [
        (True, 2, 0), (False, 2, 0),  # the first ends
        (True, 1, 0), (False, 2, 0), (False, 1, 0),
    ]  # fmt: skip
    assert not any(plan.num_idle_rows for plan in plans)


def test_a_static_batch_ends_with_its_longest_and_only_then_the_next_begins():
    _, plans = run_all(make_scheduler("dense-static"), [make_group(3, 2), make_group(3, 4), make_group(3, 2)])
    assert shapes(plans) == [
        (True, 2, 0), (False, 2, 0), (False, 1, 1), (False, 1, 1),
        (True, 1, 0), (False, 1, 0),
    ]  # fmt: skip


def test_results_of_a_static_batch_leave_when_it_ends():
    scheduler = make_scheduler("dense-static")
    first, second = make_group(3, 1), make_group(3, 3)
    scheduler.add(first)
    scheduler.add(second)
    left = []
    while (plan := scheduler.schedule()) is not None:
        left.append(scheduler.commit(plan, PoolModel(4).choose(plan)))
    assert left == [[], [], [first, second]]


def test_the_naive_static_batch_runs_as_long_as_the_longest_of_all_requests():
    groups = [make_group(3, 2), make_group(3, 3), make_group(3, 2), make_group(3, 6)]
    _, plans = run_all(make_scheduler("dense-static-global"), groups)
    first_batch = [(True, 2, 0), (False, 2, 0), (False, 1, 1), (False, 0, 2), (False, 0, 2), (False, 0, 2)]
    assert shapes(plans) == first_batch + [(True, 2, 0), (False, 2, 0), *[(False, 1, 1)] * 4]


def test_a_batch_takes_prompts_of_several_steps_but_no_more_once_it_decodes():
    groups = [make_group(6, 2), make_group(6, 3), make_group(6, 1), make_group(6, 1)]
    _, plans = run_all(make_scheduler("dense-static", num_pages=13, max_num_batched_tokens=6), groups)
    assert shapes(plans) == [(True, 1, 0)] * 3 + [(False, 2, 1), (False, 1, 2)] + [(True, 1, 0)]


def test_the_rows_of_ended_sequences_are_internal_fragmentation_until_the_batch_ends():
    memory = run_counting(make_scheduler("dense-static"), [make_group(3, 1), make_group(3, 3)])[0].memory
    assert memory.used.tolist() == [6, 4, 5]
    assert memory.reserved.tolist() == [4, 2, 1]  # one more of the first while it runs, up to 6 of the second
    assert memory.internal.tolist() == [22, 26, 26]
    assert not memory.free.any()


requests = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 3)), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([*DENSE_CACHES, "none"]), requests, st.integers(1, 5), st.integers(0, 12), st.integers(1, 40))
def test_every_request_finishes_with_its_own_tokens_and_every_slot_is_accounted_for(
    kv_cache, requests, page_size, spare, budget
):
    def scheduler():
        return make_scheduler(
            kv_cache, 3 * -(-16 // page_size) + 1 + spare, page_size, max_num_seqs=4,
            max_num_batched_tokens=budget if kv_cache != "none" else 48 + spare,
        )  # fmt: skip

    groups = [make_group(*request) for request in requests]
    outputs, plans = run_all(scheduler(), groups)
    assert not any(plan.num_preempted for plan in plans)
    assert max(len(plan.rows) + plan.num_idle_rows for plan in plans) <= 4
    for group, (prompt_len, max_tokens, n) in zip(groups, requests, strict=True):
        assert outputs[group.request_id] == [
            [1 + (31 * i + prompt_len + t) % 900 for t in range(max_tokens)] for i in range(n)
        ]
    stats, _ = run_counting(scheduler(), [make_group(*request) for request in requests])
    assert (total(stats.memory) == stats.memory.num_slots).all()
    assert stats.batch_tokens.tolist() == [sum(r.count for r in plan.rows) + plan.num_idle_rows for plan in plans]


def test_without_a_cache_every_step_computes_all_tokens_of_all_that_run():
    groups = [make_group(3, 3), make_group(2, 2), make_group(9, 3)]
    scheduler = make_scheduler("none", max_num_batched_tokens=16)
    plans = run_all(scheduler, groups)[1]
    # A step has room for 16 tokens: 5 and 3 of the first two, and not 11 more.
    assert [[row.count for row in plan.rows] for plan in plans] == [[3, 2], [4, 3], [9], [5, 10], [11]]
    assert all(plan.is_prefill and not plan.copies for plan in plans)
    memory = run_counting(scheduler, [make_group(3, 3)])[0].memory
    assert memory.free.tolist() == [32] * 3 and not memory.used.any()


def test_what_no_row_or_step_holds_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match="keeps max_model_len=40 tokens for each sequence, 10 pages of 4"):
        make_scheduler("dense", max_model_len=40)
    for kv_cache in DENSE_CACHES:
        with pytest.raises(ValueError, match=r"reserves 3 chunk\(s\) of 4 pages in a row \(16 tokens each\).*holds 2"):
            make_scheduler(kv_cache).add(make_group(3, 4, n=3))
    with pytest.raises(ValueError, match="up to 18 tokens, but max_num_batched_tokens=16: raise it"):
        make_scheduler("none", max_num_batched_tokens=16).add(make_group(3, 4, n=3))
