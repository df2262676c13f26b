"""Runs in which sequences decode beside prompts: the tokens, and what is left behind, are those of any other run."""

from __future__ import annotations

import jax
import pytest
from helpers import all_but_slow
from scripted_device import most_pages_of
from toy import few_programs, make_group, random_prompts, run_tokens, toy_engine

from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.config import PreemptionConfig
from jaxpaged.host.account.trace import TraceRecorder
from jaxpaged.host.step.features import SamplingFeatures

PARAMS = {
    "samples": [
        SamplingParams(temperature=0, max_tokens=18, stop_token_ids=[*range(30)], logprobs=2),
        SamplingParams(n=3, top_p=0.9, max_tokens=12, logprobs=2),
        SamplingParams(temperature=0, max_tokens=1),
        SamplingParams(temperature=0.8, max_tokens=15, min_tokens=4, stop_token_ids=[*range(60)]),
    ],
    "penalties": [
        SamplingParams(temperature=0, max_tokens=14, repetition_penalty=1.5),
        SamplingParams(n=2, max_tokens=9, presence_penalty=1.0, frequency_penalty=0.5),
        SamplingParams(temperature=0, max_tokens=20),
    ],
    "prompt log-probabilities": [
        SamplingParams(temperature=0, max_tokens=12),
        SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=1),
        SamplingParams(n=2, max_tokens=9),
    ],
}


def requests_of(name, count=14):
    params = PARAMS[name]
    prompts = random_prompts(count, seed=4)
    return [make_group(prompt, params[i % len(params)], str(i), seed=i) for i, prompt in enumerate(prompts)]


def some_engine(**options):
    """All of one size, so that they run the same programs."""
    return few_programs(toy_engine(num_pages=400, **options))


@pytest.fixture(scope="module")
def engine():
    return some_engine()


@pytest.fixture(scope="module")
def alternating_engine():
    return some_engine(mixed_steps=False, async_scheduling=False)


@pytest.fixture(scope="module")
def expected(alternating_engine):
    return run_tokens(alternating_engine, requests_of("samples"))


def run_over_time(engine, groups, every=2):
    """Tokens of each request, where one comes at the first step, and one more every so many steps."""
    tokens, waiting = {}, list(groups)
    with engine.step_by_hand(SamplingFeatures.of(groups, engine.model.vocab_size)) as loop:
        for step in range(10_000):
            if waiting and step % every == 0:
                loop.scheduler.add(waiting.pop(0))
            if loop.has_work:
                for group in loop.step():
                    tokens[group.request_id] = [sequence.output_ids for sequence in group.sequences]
            loop.scheduler.check_invariants()
            if not waiting and not loop.has_work:
                break
        assert engine.scheduler.allocator.num_used == 0
        return tokens


@pytest.mark.parametrize("name", all_but_slow(PARAMS, "samples", "penalties"))
def test_the_tokens_are_those_of_steps_that_alternate(engine, alternating_engine, name):
    expected = run_tokens(alternating_engine, requests_of(name))
    assert alternating_engine.stats.mixed_steps == 0
    assert run_tokens(engine, requests_of(name)) == expected
    assert run_over_time(engine, requests_of(name)) == expected
    assert engine.stats.mixed_steps >= 4


def test_and_those_of_an_engine_that_waits_for_every_step(expected):
    engine = some_engine(async_scheduling=False)
    assert run_over_time(engine, requests_of("samples")) == expected
    assert engine.stats.mixed_steps > 0


WAYS = {"recompute": PreemptionConfig(), "swap": PreemptionConfig("swap", swap_pages=1000, transfer_pages=16)}


@pytest.mark.parametrize("name", all_but_slow(WAYS, "swap"))
def test_and_in_a_pool_in_which_requests_give_way(expected, name):
    groups = requests_of("samples")
    engine = few_programs(
        toy_engine(num_pages=1 + most_pages_of(groups, 4), max_num_batched_tokens=32, preemption=WAYS[name])
    )
    assert run_over_time(engine, groups, every=1) == expected
    assert engine.stats.preemptions > 0 and engine.stats.mixed_steps > 0


def test_a_trace_tells_them(engine):
    engine.recorder = recorder = TraceRecorder(engine.cache_config)
    run_tokens(engine, requests_of("samples", 8))
    kinds = [frame["kind"] for frame in recorder.frames if frame["kind"] != "commit"]
    assert kinds[:3] == ["prefill", "mixed", "mixed"] and kinds[-1] == "decode"
    assert recorder.frames[2]["computed"] <= 64


# With a mixed step in flight


def test_a_run_that_is_left_leaves_all_pages_free(engine, expected):
    run = engine.run_steps(requests_of("samples"))
    next(run)
    assert engine.stats.mixed_steps == 1  # planned and launched, not fetched
    run.close()
    assert engine.scheduler.allocator.num_used == 0
    assert run_tokens(engine, requests_of("samples")) == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt, jax.errors.JaxRuntimeError])
@pytest.mark.parametrize("method", ["launch", "fetch", "prepare"])
def test_an_exception_leaves_the_engine_usable(engine, expected, monkeypatch, method, error):
    calls = []
    real = getattr(engine.runner, method)

    def fail_while_one_is_in_flight(*args):
        calls.append(args)
        if engine.stats.mixed_steps == 2:
            raise error("interrupted")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, method, fail_while_one_is_in_flight)
        with pytest.raises(error):
            run_tokens(engine, requests_of("samples"))
    assert engine.scheduler.allocator.num_used == 0
    assert run_tokens(engine, requests_of("samples")) == expected
