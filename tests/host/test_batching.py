"""Which program a plan runs, and that a prefill of one token a row runs as the decode step that it is."""

from __future__ import annotations

import pytest
from toy import make_group, random_prompts, run_tokens, toy_engine

from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.config import CacheConfig, EngineConfig
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.host.step.batching import Buckets, StepShape, fit
from jaxpaged.host.step.features import SamplingFeatures

CACHE = CacheConfig(page_size=4, num_pages=100)
LIMITS = EngineConfig(max_model_len=128, max_num_seqs=16, max_num_batched_tokens=64)
BUCKETS = Buckets.for_limits(LIMITS, CACHE)
PLAIN = SamplingFeatures()
GREEDY = SamplingParams(temperature=0, max_tokens=6)


def first_shape(prompts, params=GREEDY, limits=LIMITS, features=PLAIN) -> StepShape:
    scheduler = Scheduler(CACHE, limits)
    for i, prompt in enumerate(prompts):
        scheduler.add(make_group(prompt, params, str(i)))
    plan = scheduler.schedule()
    assert plan is not None and plan.is_prefill
    return BUCKETS.shape_of(plan, features)


def test_one_token_prompts_are_decoded():
    assert first_shape([[5], [6], [7]]) == StepShape(num_rows=4, table_width=32)


def test_a_chunk_of_one_token_is_decoded_though_nothing_is_sampled():
    one_at_a_time = EngineConfig(128, max_num_seqs=16, max_num_batched_tokens=1)
    assert first_shape([[5, 6, 7]], limits=one_at_a_time) == StepShape(1, 32)
    two_at_a_time = EngineConfig(128, max_num_seqs=16, max_num_batched_tokens=2)
    assert first_shape([[5], [6, 7]], limits=two_at_a_time) == StepShape(2, 32)


@pytest.mark.parametrize(
    ("prompts", "params", "features"),
    [
        pytest.param([[6, 7], [5]], GREEDY, PLAIN, id="a row of two tokens"),
        pytest.param([[5], [6]], SamplingParams(n=2), PLAIN, id="two samples of a row"),
        pytest.param([[5], [6]], GREEDY, SamplingFeatures(num_prompt_logprobs=0), id="prompt log-probabilities"),
    ],
)
def test_other_prefills_stay_prefills(prompts, params, features):
    assert first_shape(prompts, params, features=features).num_tokens == 64


@pytest.mark.slow
def test_tokens_are_the_same_by_either_step():
    """Prompts of one token are decoded; with log-probabilities of some prompt they are prefilled."""
    params = [GREEDY, SamplingParams(temperature=0.8, max_tokens=7)]

    def groups():
        return [make_group([5 + i], params[i % 2], str(i), seed=i) for i in range(3)]

    engine = toy_engine()
    decoded = run_tokens(engine, groups())
    assert engine.stats.prefill_steps == 1
    longer = make_group([8, 9, 10], SamplingParams(temperature=0, max_tokens=7, prompt_logprobs=0), "longer")
    prefilled = run_tokens(engine, [*groups(), longer])
    assert {name: prefilled[name] for name in decoded} == decoded


def test_a_prompt_computed_token_by_token_gives_the_same_tokens():
    groups = [[make_group(p, GREEDY, str(i)) for i, p in enumerate(random_prompts(3, 4, 9))] for _ in "ab"]
    assert run_tokens(toy_engine(max_num_batched_tokens=1), groups[0]) == run_tokens(toy_engine(), groups[1])


def test_large_batches_are_padded_little():
    """Small steps take what their weights take, so padding costs nothing there; large ones take time by the row."""
    limits = EngineConfig(max_model_len=64, max_num_seqs=512)
    sizes = Buckets.for_limits(limits, CacheConfig(16, 100)).decode_rows
    assert sizes[:8] == (1, 2, 4, 8, 16, 32, 64, 96) and sizes[-4:] == (320, 384, 448, 512) and len(sizes) == 17
    padded = [fit(rows, sizes) / rows for rows in range(128, 513)]
    assert max(padded) < 1.25 and sum(padded) / len(padded) < 1.1
