"""Mixed steps without jax: what they hold, when there are none, and that nothing else changes by them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_device import PoolModel, make_group, make_scheduler, make_search, most_pages_of, run_all, run_searches

from jaxpaged.config import CacheConfig, EngineConfig, PreemptionConfig
from jaxpaged.host.mixing import num_prompt_tokens
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.host.step.batching import Buckets, StepShape, make_batch
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.step_io import DecodeBatch, MixedBatch


def kinds_of(plans) -> str:
    """P: prompts alone, D: decode alone, M: both."""
    return "".join("M" if plan.is_mixed else "P" if plan.is_prefill else "D" for plan in plans)


def run_in_time(scheduler, arrivals, is_async=False):
    """Tokens of each request, and the plans; `arrivals`: (first step at which it may run, group) of each."""
    pool, plans, done, flight, queue = PoolModel(scheduler.cache.page_size), [], {}, None, list(arrivals)
    while queue or flight is not None or scheduler.has_work:
        while queue and (queue[0][0] <= len(plans) or not scheduler.has_work):
            scheduler.add(queue.pop(0)[1])
        if flight is None:
            plan = scheduler.schedule()
            flight = plan, pool.run(plan)
        (plan, outputs), flight = flight, None
        plans.append(plan)
        if is_async:
            scheduler.foresee(plan)
            if (following := scheduler.schedule(is_ahead=True)) is not None:
                flight = following, pool.run(following)
        for group in scheduler.commit(plan, outputs):
            done[group.request_id] = [sequence.output_ids for sequence in group.sequences]
        scheduler.check_invariants()
        assert len(plans) < 5000, "the scheduler makes no progress"
    assert scheduler.allocator.num_used == 0 and not pool.swapped
    return done, plans


def test_who_decodes_goes_on_while_a_prompt_is_computed():
    arrivals = [(0, make_group(3, 5)), (2, make_group(10, 2))]
    _, plans = run_in_time(make_scheduler(64, max_num_batched_tokens=6), arrivals)
    assert kinds_of(plans) == "PDMMD"
    assert [[(row.start, row.count) for row in plan.rows] for plan in plans[2:]] == [
        [(4, 1), (0, 5)],
        [(5, 1), (5, 5)],
        [(6, 1), (10, 1)],
    ]
    assert [len(plan.samples) for plan in plans[2:]] == [1, 2, 2]


def test_without_mixed_steps_it_stands_still():
    arrivals = [(0, make_group(3, 5)), (2, make_group(10, 2))]
    _, plans = run_in_time(make_scheduler(64, max_num_batched_tokens=6, mixed_steps=False), arrivals)
    assert kinds_of(plans) == "PDPPDDD"


def test_the_first_samples_of_a_prompt_come_behind_those_that_decode():
    arrivals = [(0, make_group(3, 6)), (2, make_group(4, 3, n=2))]
    _, plans = run_in_time(make_scheduler(64), arrivals)
    assert [(sample.group is arrivals[1][1], sample.row) for sample in plans[2].samples] == [
        (False, 0),
        (True, 1),
        (True, 1),
    ]


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param(dict(kv_cache="dense"), id="rows of a dense cache"),
        pytest.param(dict(kv_cache="dense-static"), id="a static batch"),
        pytest.param(dict(kv_cache="none"), id="no cache"),
        pytest.param(dict(cascade_attention=True), id="shared pages that decode steps read once"),
        pytest.param(dict(mixed_steps=False), id="none asked for"),
    ],
)
def test_where_limits_do_not_allow_them_steps_alternate(limits):
    wide = limits.get("kv_cache") == "none"
    defaults = dict(max_num_seqs=4, max_num_batched_tokens=64 if wide else 8)
    scheduler = Scheduler(CacheConfig(2, 200), EngineConfig(32, **(defaults | limits)))
    assert (Buckets.for_limits(scheduler.limits, scheduler.cache).mixed_shapes() == []) == (
        not scheduler.limits.can_mix_steps
    )
    _, plans = run_all(scheduler, [make_group(6, 3), make_group(6, 5), make_group(9, 2)])
    assert "M" not in kinds_of(plans)


def test_chunks_that_are_read_one_by_one_may_be_mixed_too():
    limits = EngineConfig(32, 4, 8, kv_cache="contiguous-oracle")
    _, plans = run_all(Scheduler(CacheConfig(2, 200), limits), [make_group(6, 3), make_group(6, 5), make_group(9, 2)])
    assert kinds_of(plans) == "PMMDDD"


def test_beams_are_not_mixed_with_prompts_of_any_kind():
    plans = []
    groups = [make_group(6, 4), make_search(6, 4, 2), make_group(9, 4)]
    alternating = run_searches(make_scheduler(64, max_num_batched_tokens=8, mixed_steps=False), groups)
    groups = [make_group(6, 4), make_search(6, 4, 2), make_group(9, 4)]
    assert run_searches(make_scheduler(64, max_num_batched_tokens=8), groups, plans.append) == alternating
    assert "M" not in kinds_of(plans)


def test_a_prompt_whose_log_probabilities_are_wanted_is_computed_without_others():
    arrivals = [(0, make_group(3, 9)), (1, make_group(4, 6, prompt_logprobs=1)), (3, make_group(4, 2))]
    _, plans = run_in_time(make_scheduler(64), arrivals)
    assert kinds_of(plans)[:4] == "PPDM"


def test_while_decoding_takes_most_of_the_budget_steps_alternate():
    arrivals = [(0, make_group(2, 4)), (0, make_group(2, 6)), (1, make_group(8, 2))]
    _, plans = run_in_time(make_scheduler(64, max_num_batched_tokens=3), arrivals)
    assert kinds_of(plans) == "PMPPPDDDDD"  # one may decode beside a prompt, two may not


def test_where_pages_are_short_prompts_are_computed_before_someone_gives_way():
    arrivals = [(0, make_group(2, 20)), (0, make_group(2, 20)), (1, make_group(16, 2))]
    done, plans = run_in_time(make_scheduler(num_pages=17, max_num_batched_tokens=4), arrivals)
    assert kinds_of(plans).startswith("PMMMMMMPD")
    assert [plan.num_preempted for plan in plans[:9]] == [0] * 8 + [1]
    assert len(done) == 3


def test_tokens_of_prompts_fill_the_sizes_to_which_they_are_padded():
    sizes = (256, 1024, 4096, 8192)
    asked = {700: 256, 800: 800, 1100: 1024, 3100: 3100, 5000: 4096, 9000: 8000, 90: 90}
    assert {tokens: num_prompt_tokens(tokens, 8000, sizes) for tokens in asked} == asked


def mixed_plan(prompt_lens, n=1, budget=64):
    """A step in which two sequences decode and these prompts are computed, and the scheduler that made it."""
    scheduler = make_scheduler(64, max_num_batched_tokens=budget, max_num_seqs=16)
    for _ in range(2):
        scheduler.add(make_group(3, 9))
    scheduler.commit(plan := scheduler.schedule(), PoolModel(2).run(plan))
    for length in prompt_lens:
        scheduler.add(make_group(length, 3, n=n))
    return scheduler.schedule(), scheduler


def test_rows_of_one_token_are_computed_apart_from_longer_ones():
    plan, scheduler = mixed_plan([5, 1, 4], n=2)
    buckets, features = Buckets.for_limits(scheduler.limits, scheduler.cache), SamplingFeatures()
    shape = buckets.shape_of(plan, features)
    assert shape == StepShape(8, buckets.table_widths[0], num_tokens=64, num_prompts=16)
    batch = make_batch(plan, shape, scheduler.cache, 2000, features)
    assert isinstance(batch, MixedBatch)
    decode, prefill = batch.inputs
    assert decode.context_lens.tolist() == [4, 4, 1] + [0] * 5
    assert prefill.query_lens.tolist() == [5, 4] + [0] * 14
    # Two that decode, then two samples of each prompt: behind 8 rows of one token lie tokens 0 to 4 and 5 to 8.
    assert prefill.sample_from.tolist() == [0, 1, 8 + 4, 8 + 4, 2, 2, 8 + 8, 8 + 8]


def test_where_all_rows_have_one_token_it_is_a_decode_step():
    plan, scheduler = mixed_plan([1, 1])
    buckets, features = Buckets.for_limits(scheduler.limits, scheduler.cache), SamplingFeatures()
    assert plan.is_mixed
    batch = make_batch(plan, buckets.shape_of(plan, features), scheduler.cache, 2000, features)
    assert isinstance(batch, DecodeBatch)


def test_mixed_steps_have_few_sizes():
    buckets = Buckets.for_limits(EngineConfig(8192), CacheConfig(16, 1000))
    assert buckets.mixed_rows == (8, 64, 256) and buckets.mixed_tokens == (128, 512, 2048, 8192)
    assert [buckets.mixed_prompts(size) for size in buckets.mixed_tokens] == [8, 32, 128, 256]
    assert len(buckets.mixed_shapes()) == 24


request = st.tuples(
    st.integers(1, 14), st.integers(1, 12), st.integers(1, 3), st.integers(0, 20), st.sampled_from([None, 3, 9])
)  # prompt_len, max_tokens, n, steps after the request before, token that ends a sample


@settings(max_examples=150, deadline=None)
@given(
    st.lists(request, min_size=1, max_size=8), st.integers(1, 5), st.integers(0, 6), st.integers(1, 24),
    st.integers(3, 10), st.sampled_from([PreemptionConfig(), PreemptionConfig("swap", swap_pages=30)]),
)  # fmt: skip
def test_the_tokens_are_those_of_steps_that_alternate(requests, page_size, spare, budget, max_num_seqs, preemption):
    """Requests that come over time, in small pools; whether the next step is planned while one runs or not. The
    scripted device checks that every row reads its own tokens."""

    def arrivals():
        step, made = 0, []
        for prompt_len, max_tokens, n, later, stop in requests:
            step += later
            made.append((step, make_group(prompt_len, max_tokens, n=n, stop_token_ids=[stop] if stop else [])))
        return made

    def run(is_async, mixed_steps):
        groups = arrivals()
        num_pages = most_pages_of([group for _, group in groups], page_size) + 1 + spare
        scheduler = make_scheduler(
            num_pages, page_size, max_num_seqs, budget, preemption=preemption, mixed_steps=mixed_steps
        )
        done, plans = run_in_time(scheduler, groups, is_async)
        return [done[group.request_id] for _, group in groups], plans

    expected, plans = run(is_async=False, mixed_steps=False)
    assert "M" not in kinds_of(plans)
    for is_async in (False, True):
        tokens, plans = run(is_async, mixed_steps=True)
        assert tokens == expected
        for plan in plans:
            assert not plan.is_prefill or sum(row.count for row in plan.rows) <= budget
