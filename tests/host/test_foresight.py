"""Steps that are planned before the tokens of the step before are known: the same tokens, and no page lost."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_device import PoolModel, make_group, make_scheduler, most_pages_of, run_ahead, run_all

from jaxpaged.config import PreemptionConfig
from jaxpaged.host.account.accounting import RunStats
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.step_io import BAD_LOGITS, StepOutputs, TokenLogprobs


def test_who_ends_by_length_has_no_row_behind_its_end():
    _, plans = run_ahead(make_scheduler(64), [make_group(3, 2), make_group(3, 5)])
    assert [len(plan.rows) for plan in plans] == [2, 2, 1, 1, 1]
    assert sum(plan.num_trimmed for plan in plans) == 0


def test_who_ends_by_a_token_has_one_row_too_many_which_is_trimmed():
    group = make_group(2, 8, stop_token_ids=[5])  # the third token
    outputs, plans = run_ahead(make_scheduler(64), [group, other := make_group(2, 6)])
    assert outputs[group.request_id] == [[3, 4, 5]] and outputs[other.request_id] == [[3, 4, 5, 6, 7, 8]]
    assert [len(plan.rows) for plan in plans] == [2, 2, 2, 2, 1, 1]
    assert [plan.num_trimmed for plan in plans] == [0, 0, 0, 1, 0, 0]
    assert group.sequences[0].cumulative_logprob == -3.0


def test_memory_of_who_ends_by_length_is_free_for_the_next_step():
    """The second request fits only when the first has gone, and follows it without a step between them."""
    first, second = make_group(4, 3), make_group(4, 3)
    _, plans = run_ahead(make_scheduler(num_pages=4), [first, second])
    assert [[row.group for row in plan.rows] for plan in plans] == [[first]] * 3 + [[second]] * 3


def test_nobody_gives_way_before_the_tokens_are_known():
    groups = [make_group(4, 12), make_group(4, 12)]
    scheduler = make_scheduler(11)
    outputs, plans = run_ahead(scheduler, groups)
    assert sum(plan.num_preempted for plan in plans) > 0
    assert outputs == run_all(make_scheduler(1000), groups_like(groups))[0]


def groups_like(groups):
    """The same requests anew, by the same names."""
    fresh = []
    for group in groups:
        params = group.params
        one = make_group(
            group.prompt_len, group.max_len - group.prompt_len, params.n, stop_token_ids=params.stop_token_ids
        )
        one.request_id = group.request_id
        fresh.append(one)
    return fresh


requests = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.none() | st.integers(0, 12)),
    min_size=1, max_size=8,
)  # prompt_len, max_tokens, n, tokens before the one that ends the first sample  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(requests, st.integers(1, 5), st.integers(0, 6), st.integers(1, 40), st.integers(4, 10), st.booleans())
def test_tokens_are_those_of_a_host_that_waits(requests, page_size, spare, budget, max_num_seqs, swaps):
    groups = [
        make_group(prompt_len, most, n, stop_token_ids=None if end is None else [1 + prompt_len + end])
        for prompt_len, most, n, end in requests
    ]
    waiting = groups_like(groups)
    size = most_pages_of(groups, page_size) + 1 + spare, page_size, max_num_seqs, budget
    way = PreemptionConfig("swap", swap_pages=40) if swaps else None
    outputs, _ = run_ahead(make_scheduler(*size, preemption=way), groups)
    assert outputs == run_all(make_scheduler(*size, preemption=way), waiting)[0]
    for group, other in zip(groups, waiting, strict=True):
        for one, two in zip(group.sequences, other.sequences, strict=True):
            assert (one.finish_reason, one.stop_reason) == (two.finish_reason, two.stop_reason)
            assert one.cumulative_logprob == two.cumulative_logprob and one.num_pending == 0


@pytest.mark.parametrize("system", ["paged", "contiguous-pow2", "dense-static"])
def test_who_fails_in_the_step_that_was_to_be_its_last_leaves_once(system):
    plain = make_scheduler(200)
    scheduler = Scheduler(plain.cache, dataclasses.replace(plain.limits, kv_cache=system))
    scheduler.add(failing := make_group(3, 1))
    scheduler.add(other := make_group(3, 2))
    left = []
    for tokens in ([BAD_LOGITS, 7], [8]):
        plan = scheduler.schedule()
        scheduler.foresee(plan)
        left += scheduler.commit(plan, StepOutputs(np.array(tokens), TokenLogprobs(np.zeros(len(tokens)))))
        scheduler.check_invariants()
    assert left == [failing, other] and not scheduler.has_work
    assert failing.error is not None and failing.sequences[0].finish_reason == "error"


@pytest.mark.parametrize("is_async", [False, True])
def test_a_row_that_is_trimmed_fills_no_slot_in_hindsight(is_async):
    plain = make_scheduler(200)
    scheduler = Scheduler(plain.cache, dataclasses.replace(plain.limits, kv_cache="contiguous-pow2"))
    scheduler.add(make_group(2, 16, stop_token_ids=[5]))
    stats, pool = RunStats.for_cache(scheduler.cache), PoolModel(2)

    def launch():
        if (plan := scheduler.schedule(is_ahead=is_async)) is None:
            return None
        stats.record(plan, scheduler)
        return plan, pool.run(plan)

    step = launch()
    while step is not None:
        if is_async:
            scheduler.foresee(step[0])
        following = launch() if is_async else None
        scheduler.commit(*step)
        step = following or launch()
    assert set((stats.memory.used + stats.memory.reserved).tolist()) == {5}  # two of the prompt, 3, 4, and 5 that ends


@pytest.mark.parametrize("system", ["contiguous-pow2", "dense", "dense-static", "dense-static-global"])
def test_other_systems_are_planned_ahead_too(system):

    plain = make_scheduler(200)
    limits = dataclasses.replace(plain.limits, kv_cache=system, max_num_seqs=5)
    groups = [make_group(3, most, n, stop_token_ids=[8]) for most, n in [(3, 1), (9, 2), (1, 1), (6, 1), (4, 3)]]
    expected, _ = run_all(Scheduler(plain.cache, limits), groups_like(groups))
    outputs, plans = run_ahead(Scheduler(plain.cache, limits), groups)
    assert outputs == expected and sum(plan.num_trimmed for plan in plans) > 0
