"""The next step is on its way while the host learns what the last one chose: when, and that it changes nothing."""

from __future__ import annotations

import dataclasses
import time
from types import SimpleNamespace

import jax
import pytest
import scripted_device
from scripted_device import most_pages_of
from toy import beam_group, few_programs, make_group, random_prompts, run_tokens, toy_engine

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.engine.record import RunRecord
from jaxpaged.engine.step_loop import StepLoop
from jaxpaged.host.account.trace import TraceRecorder
from jaxpaged.host.step.features import SamplingFeatures

PARAMS = [
    SamplingParams(temperature=0, max_tokens=18, stop_token_ids=[*range(40)], logprobs=2),
    SamplingParams(n=3, top_p=0.9, top_k=20, max_tokens=20, stop_token_ids=[*range(8)], logprobs=2),
    SamplingParams(temperature=0.8, max_tokens=9, prompt_logprobs=1),
    SamplingParams(n=2, min_p=0.05, max_tokens=15, min_tokens=4, stop_token_ids=[*range(60)]),
    SamplingParams(temperature=0, max_tokens=1),
]

PENALISED = [
    SamplingParams(temperature=0, max_tokens=14, repetition_penalty=1.5),
    SamplingParams(n=3, max_tokens=9, presence_penalty=1.0, frequency_penalty=0.5, stop_token_ids=[*range(10)]),
    SamplingParams(temperature=0, max_tokens=20),
]


def mixed_requests(count=15):
    return [make_group(prompt, PARAMS[i % 5], str(i), seed=i) for i, prompt in enumerate(random_prompts(count))]


def some_engine(is_async):
    """All of one size, so that they run the same programs."""
    return few_programs(toy_engine(num_pages=400, async_scheduling=is_async))


@pytest.fixture(scope="module")
def engine():
    return some_engine(is_async=True)


@pytest.fixture(scope="module")
def waiting_engine():
    """One that learns what each step chose before it plans the next."""
    return some_engine(is_async=False)


def results_of(engine, groups):
    """Everything that a request gets, by its name."""
    results = {}
    for group in engine.run(groups):
        samples = [
            (one.output_ids, one.finish_reason, one.stop_reason, approximate([{0: (one.cumulative_logprob, 0)}]),
             approximate(one.logprobs))
            for one in group.sequences
        ]  # fmt: skip
        results[group.request_id] = samples, approximate(group.prompt_logprobs)
        engine.scheduler.check_invariants()
    return results


def approximate(entries):
    """Which tokens they speak of, and log-probabilities up to the order in which a batch adds."""
    return [
        {token: (pytest.approx(logprob, abs=1e-4), rank) for token, (logprob, rank) in one.items()} for one in entries
    ]


def events_of(engine, groups):
    """In which order steps are launched and fetched: L and F."""
    events = []
    runner, launch, fetch = engine.runner, engine.runner.launch, engine.runner.fetch
    runner.launch = lambda step: (events.append("L"), launch(step))[1]
    runner.fetch = lambda launched: (events.append("F"), fetch(launched))[1]
    try:
        list(engine.run(groups))
    finally:
        del runner.launch, runner.fetch
    return "".join(events)


@pytest.fixture(scope="module")
def expected(waiting_engine):
    return results_of(waiting_engine, mixed_requests())


def test_a_step_is_launched_before_the_last_one_is_fetched(engine):
    groups = [make_group([5, 6, 7], SamplingParams(temperature=0, max_tokens=4))]
    assert events_of(engine, groups) == "LLFLFLFF"


def test_without_async_scheduling_every_step_is_fetched_first(waiting_engine):
    groups = [make_group([5, 6, 7], SamplingParams(temperature=0, max_tokens=4))]
    assert events_of(waiting_engine, groups) == "LFLFLFLF"


def test_what_a_request_gets_is_the_same(engine, expected):
    assert results_of(engine, mixed_requests()) == expected
    assert engine.stats.num_generated_tokens == sum(
        len(sample[0]) for samples, _ in expected.values() for sample in samples
    )


def test_and_in_a_tight_pool_with_few_rows(expected):
    engine = some_engine(is_async=True)
    num_pages = 2 + most_pages_of(mixed_requests(), 4)
    engine.cache_config = dataclasses.replace(engine.cache_config, num_pages=num_pages)  # a part of the runner's pool
    engine.limits = dataclasses.replace(engine.limits, max_num_seqs=9, max_num_batched_tokens=16)
    assert results_of(engine, mixed_requests()) == expected
    assert engine.stats.preemptions > 0


def test_where_the_arrays_of_a_step_need_the_last_token_it_waits(engine):
    """Which word is banned next depends on it."""
    group = make_group([5, 6, 7], SamplingParams(temperature=0, max_tokens=4))
    group.banned_words = ((8, 9),)
    assert events_of(engine, [group]) == "LFLFLFLF"


def penalised_requests():
    return [make_group(prompt, PENALISED[i % 3], str(i), seed=i) for i, prompt in enumerate(random_prompts(9))]


@pytest.mark.slow
def test_the_device_keeps_the_history_that_penalties_are_made_of(engine, waiting_engine):
    sent = []
    launch = engine.runner.launch
    engine.runner.launch = lambda step: (sent.append(step.goes_on), launch(step))[1]
    try:
        assert results_of(engine, penalised_requests()) == results_of(waiting_engine, penalised_requests())
    finally:
        del engine.runner.launch
    assert sum(sent) >= len(sent) / 3


@pytest.mark.slow
def test_penalised_tokens_do_not_depend_on_batch_or_preemption(engine):
    """Histories are sent anew whenever a batch changes, in the middle of a page or of a preemption."""
    tight = few_programs(
        toy_engine(num_pages=2 + most_pages_of(penalised_requests(), 4), max_num_seqs=4, max_num_batched_tokens=16)
    )
    expected = results_of(engine, penalised_requests())
    assert results_of(tight, penalised_requests()) == expected
    for group in penalised_requests()[1:2]:
        assert results_of(engine, [group]) == {group.request_id: expected[group.request_id]}


def test_beams_go_on_ahead_behind_their_first_step_and_before_their_last(engine):
    search = beam_group([5, 6, 7], BeamSearchParams(beam_width=2, max_tokens=5), ())
    assert events_of(engine, [search]) == "LFLLFLFLFF"


def test_beams_wait_for_the_host_where_it_chooses_them(engine):
    search = beam_group(
        [5, 6, 7], BeamSearchParams(beam_width=4, max_tokens=4, num_beam_groups=2, diversity_penalty=1.0), ()
    )
    assert events_of(engine, [search]) == "LFLFLFLF"


def test_while_a_trace_is_recorded_nothing_overlaps(engine):
    engine.recorder = TraceRecorder(engine.cache_config)
    groups = [make_group([5, 6, 7], SamplingParams(temperature=0, max_tokens=4))]
    assert events_of(engine, groups) == "LFLFLFLF"


def test_a_run_that_is_left_with_a_step_in_flight_leaves_all_pages_free(engine, expected):
    for leave_after in range(1, 6):
        run = engine.run_steps(mixed_requests())
        for _ in range(leave_after):
            next(run)
        run.close()
        assert engine.scheduler.allocator.num_used == 0
    assert results_of(engine, mixed_requests()) == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt, jax.errors.JaxRuntimeError])
@pytest.mark.parametrize("method", ["launch", "fetch", "prepare"])
def test_an_exception_with_a_step_in_flight_leaves_the_engine_usable(engine, expected, monkeypatch, method, error):
    calls = []
    real = getattr(engine.runner, method)

    def fail_in_the_fourth(*args):
        calls.append(args)
        if len(calls) == 4:
            raise error("interrupted")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, method, fail_in_the_fourth)
        with pytest.raises(error):
            run_tokens(engine, mixed_requests())
    assert engine.scheduler.allocator.num_used == 0
    assert results_of(engine, mixed_requests()) == expected


def test_a_step_that_failed_on_the_device_costs_the_pool_and_no_more(engine, expected):
    """What it leaves in the place of its results raises its error whenever it is read."""

    class Failed:
        def block_until_ready(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: the step failed")

    pool = engine.runner.pool
    engine.runner._carried = Failed()
    assert results_of(engine, mixed_requests()) == expected
    assert engine.runner.pool is not pool


def test_times_of_overlapping_steps_do_not_overlap_and_add_up(engine):
    list(engine.run(mixed_requests()))
    stats = engine.stats
    begins, ends = stats.step_times
    assert (begins[1:] >= ends[:-1]).all() and (ends > begins).all()
    parts = stats.seconds
    assert parts["schedule"] + parts["device"] + parts["host"] == pytest.approx(parts["total"])
    assert min(parts.values()) >= 0


class ScriptedRunner:
    def __init__(self, pool):
        self.launch, self.fetch = lambda step: pool.run(step.plan), lambda outputs: outputs

    def prepare(self, plan, features):
        return SimpleNamespace(plan=plan, copies_before=[])  # PoolModel makes the copies of a plan itself

    def copy_pages(self, copies):
        assert not copies


def test_tokens_are_counted_when_they_have_come():
    scheduler = scripted_device.make_scheduler(num_pages=64)
    scheduler.add(group := scripted_device.make_group(4, 12, n=3))
    record = RunRecord(scheduler.cache)
    runner = ScriptedRunner(scripted_device.PoolModel(scheduler.cache.page_size))
    loop = StepLoop(runner, scheduler, SamplingFeatures(), record, is_async=True)
    for count in (1, 2, 3):
        loop.step()
        assert [len(sequence.output_ids) for sequence in group.sequences] == [count] * 3
        assert record.stats.num_generated_tokens == 3 * count


def test_what_the_caller_does_while_a_step_runs_is_no_time_of_the_engine():
    scheduler = scripted_device.make_scheduler(num_pages=11)
    for _ in range(2):
        scheduler.add(scripted_device.make_group(4, 12))
    record = RunRecord(scheduler.cache)
    runner = ScriptedRunner(scripted_device.PoolModel(scheduler.cache.page_size))
    loop = StepLoop(runner, scheduler, SamplingFeatures(), record, is_async=True)
    while loop.has_work:
        loop.step()
        time.sleep(0.02)
    assert record.stats.recomputed_tokens > 0
    assert 0 < record.stats.seconds["recompute"] < record.stats.seconds["device"]
