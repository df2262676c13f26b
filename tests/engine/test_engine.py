"""The contracts of the engine: a sample depends on nothing but its own request, and preemption changes no token."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import all_but_slow
from scripted_device import most_pages_of
from toy import TOY, few_programs, make_group, random_prompts, run_tokens, toy_engine

from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.host.step.features import SamplingFeatures

PARAMS = [
    SamplingParams(temperature=0, max_tokens=18),
    SamplingParams(n=3, top_p=0.9, top_k=20, max_tokens=20),
    SamplingParams(temperature=0.8, repetition_penalty=1.3, max_tokens=9),
    SamplingParams(n=2, min_p=0.05, frequency_penalty=0.5, max_tokens=15),
]


def mixed_requests(count=12, seed=0):
    return [
        make_group(prompt, PARAMS[i % 4], str(i), seed=i) for i, prompt in enumerate(random_prompts(count, seed=seed))
    ]


@pytest.fixture(scope="module")
def large():
    """A pool in which nothing is ever preempted."""
    return few_programs(toy_engine(num_pages=400, max_num_seqs=32, max_num_batched_tokens=512))


@pytest.fixture(scope="module")
def expected(large):
    """Everything in one batch."""
    engine = large
    tokens = run_tokens(engine, mixed_requests())
    assert engine.stats.preemptions == 0
    return tokens


@pytest.mark.parametrize("i", [1, 2])
def test_a_sample_is_the_same_alone(large, expected, i):
    assert run_tokens(large, [mixed_requests()[i]]) == {str(i): expected[str(i)]}


@pytest.mark.parametrize("page_size", all_but_slow([1, 5, 16], 16))
def test_the_page_size_changes_no_token(expected, page_size):
    assert (
        run_tokens(few_programs(toy_engine(num_pages=1 + 1600 // page_size, page_size=page_size)), mixed_requests())
        == expected
    )


def test_order_batch_and_chunks_change_no_token(expected):
    engine = few_programs(toy_engine(max_num_seqs=5, max_num_batched_tokens=16))
    assert run_tokens(engine, mixed_requests()[::-1]) == expected


@pytest.mark.parametrize("spare_pages", all_but_slow([0, 3], 0))
def test_preemption_changes_no_token(expected, spare_pages):
    """With a pool that just holds the largest group, every request finishes with the tokens of an endless pool."""
    groups = mixed_requests()
    largest = most_pages_of(groups, page_size=4)
    engine = few_programs(toy_engine(num_pages=1 + largest + spare_pages, page_size=4))
    assert run_tokens(engine, groups) == expected
    assert engine.stats.preemptions > 0
    assert engine.stats.recomputed_tokens > 0
    assert max(engine.stats.pages_used) <= largest + spare_pages


def test_another_seed_gives_other_samples_and_greedy_ignores_it(large, expected):
    groups = [make_group(p, PARAMS[i % 2], str(i), seed=99) for i, p in enumerate(random_prompts(2))]
    tokens = run_tokens(large, groups)
    assert tokens["0"] == expected["0"]
    assert tokens["1"] != expected["1"]


def test_stats_add_up(large, expected):
    run_tokens(large, mixed_requests())
    stats = large.stats
    assert stats.num_generated_tokens == sum(len(sample) for samples in expected.values() for sample in samples)
    assert len(stats.pages_used) == len(stats.logical_pages) == len(stats.running) == stats.steps
    assert stats.pages_used[0] <= stats.logical_pages[0]
    assert stats.batch_tokens.sum() == stats.num_prompt_tokens + stats.num_generated_tokens - sum(
        len(samples) for samples in expected.values()
    )  # the first token of each sample comes with its prompt
    parts = stats.seconds
    np.testing.assert_allclose(parts["schedule"] + parts["device"] + parts["host"], parts["total"], rtol=0.1)


def test_logprobs_of_prompt_and_output_survive_chunks_and_preemption():
    params = SamplingParams(temperature=0.7, max_tokens=12, logprobs=2, prompt_logprobs=3)
    prompts = random_prompts(4, low=10, high=25, seed=7)

    def run(**engine_options):
        groups = [make_group(prompt, params, str(i), seed=i) for i, prompt in enumerate(prompts)]
        engine = few_programs(toy_engine(**engine_options))
        run_tokens(engine, groups)
        return engine, groups

    _, wide = run(num_pages=200, max_num_batched_tokens=512)
    engine, tight = run(num_pages=17, max_num_batched_tokens=16)
    assert engine.stats.preemptions > 0
    for one, other in zip(wide, tight, strict=True):
        assert len(one.prompt_logprobs) == len(other.prompt_logprobs) == one.prompt_len - 1
        assert len(one.sequences[0].logprobs) == one.sequences[0].num_generated
        for a, b in zip(
            one.prompt_logprobs + one.sequences[0].logprobs,
            other.prompt_logprobs + other.sequences[0].logprobs,
            strict=True,
        ):
            assert a.keys() == b.keys()
            np.testing.assert_allclose([v[0] for v in a.values()], [v[0] for v in b.values()], atol=1e-4)
        tokens = [next(iter(entry)) for entry in one.prompt_logprobs + one.sequences[0].logprobs]
        assert tokens == one.sequences[0].token_ids[1:]  # each entry begins with the token itself


def test_a_greedy_token_has_rank_1_and_the_highest_logprob():
    group = make_group([5, 6, 7], SamplingParams(temperature=0, max_tokens=5, logprobs=TOY.vocab_size))
    run_tokens(toy_engine(), [group])
    sequence = group.sequences[0]
    for token, entry in zip(sequence.output_ids, sequence.logprobs, strict=True):
        assert entry[token][1] == 1 and len(entry) == TOY.vocab_size
        np.testing.assert_allclose(sum(np.exp(logprob) for logprob, _ in entry.values()), 1, rtol=1e-4)
    np.testing.assert_allclose(
        sequence.cumulative_logprob,
        sum(e[t][0] for t, e in zip(sequence.output_ids, sequence.logprobs, strict=True)),
        rtol=1e-5,
    )


def test_one_run_at_a_time(large, expected):
    first = large.run(mixed_requests())
    next(first)
    with pytest.raises(RuntimeError, match="another run is in progress"):
        next(large.run(mixed_requests()))
    first.close()
    assert run_tokens(large, mixed_requests()) == expected


def test_an_interrupt_in_the_middle_of_a_step_leaves_the_engine_usable(large, expected, monkeypatch):
    def take_the_pool_and_stop(*_):
        for array in (*large.runner.pool.k, *large.runner.pool.v):
            array.delete()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(large.runner, "launch", take_the_pool_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run_tokens(large, mixed_requests())
    assert run_tokens(large, mixed_requests()) == expected


def test_a_page_outside_the_pool_never_reaches_the_device():
    engine = toy_engine(num_pages=20, async_scheduling=False)
    group = make_group([5, 6, 7, 8, 9, 10], SamplingParams(temperature=0, max_tokens=5))
    with engine.step_by_hand(SamplingFeatures()) as loop:
        loop.scheduler.add(group)
        loop.step()
        group.sequences[0].table.pages[0] = 20
        with pytest.raises(RuntimeError, match="block_tables: row 0, entry 0 is 20, but the pool has 20 pages of 4 to"):
            loop.step()
    assert not any(pool.is_deleted() for pool in engine.runner.pool.k)


def test_leaving_a_run_early_drops_the_rest_and_leaves_the_engine_usable(large, expected):
    for _ in large.run(mixed_requests()):
        break
    assert run_tokens(large, mixed_requests()) == expected
