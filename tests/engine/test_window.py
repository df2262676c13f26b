"""A model all of whose layers have a window: tokens are those of a pool in which all pages stay, whatever those hold
that were given back."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import pytest
from helpers import greedy_tokens
from scripted_device import most_pages_of
from toy import TOY, beam_group, few_programs, make_group, random_prompts, run_checked, toy_engine, toy_params

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.config import PreemptionConfig
from jaxpaged.host.beams.beam_state import best_hypotheses

WINDOW = 11
MODEL = dataclasses.replace(TOY, sliding_window=WINDOW)


def some_engine(**options):
    return few_programs(toy_engine(model=MODEL, max_num_batched_tokens=16, **options))


def run_poisoned(engine, groups) -> dict[str, list]:
    """As `run_checked`, with NaN in all pages between two steps that nobody holds or can find, page 0 among them."""
    for _ in engine.run_steps(groups):
        engine.scheduler.check_invariants()
        allocator = engine.scheduler.allocator
        known = allocator.known.hashes
        free = [page for page in range(allocator.num_pages) if not allocator.ref_count(page) and page not in known]
        pool, ids = engine.runner.pool, jnp.array(free)
        k, v = (tuple(layer.at[ids].set(jnp.nan) for layer in layers) for layers in (pool.k, pool.v))
        engine.runner.pool = dataclasses.replace(pool, k=k, v=v)
    return {
        group.request_id: [h.token_ids for h in best_hypotheses(group.beams, 99)]
        if group.beams
        else [sequence.output_ids for sequence in group.sequences]
        for group in groups
    }


def long_groups():
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    prompts = [*random_prompts(2, low=3, high=25, seed=3), *random_prompts(1, low=70, high=70)]
    return [make_group(prompt, params, str(i)) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("is_async", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_generations_longer_than_the_pool_hold_no_more_than_their_windows(is_async):
    engine = some_engine(num_pages=17, async_scheduling=is_async)
    groups = long_groups()
    tokens = (run_checked if is_async else run_poisoned)(engine, groups)
    for group in groups:
        prompt = group.sequences[0].token_ids[: group.prompt_len]
        assert tokens[group.request_id] == [greedy_tokens(toy_params(), MODEL, prompt, 50, padded_len=128)]
    # 11 positions are in 4 pages of 4 at most, prompts of 21 to 24 in 6; one in chunks of 16 has 8 pages.
    assert [group.pages.physical_at_peak for group in groups] == [6, 6, 8]
    assert engine.stats.pages_used.max() <= 16


def mixed_groups():
    """Samples and beams that begin alike."""
    (stem,) = random_prompts(1, low=21, high=21, seed=7)
    kinds = [
        SamplingParams(temperature=0, max_tokens=40),
        SamplingParams(n=3, top_p=0.9, max_tokens=30),
        BeamSearchParams(beam_width=3, max_tokens=24),
    ]
    groups = []
    for i, own in enumerate(random_prompts(9, low=1, high=6, seed=2)):
        params = kinds[i % 3]
        is_search = isinstance(params, BeamSearchParams)
        name = str(i)
        groups.append(beam_group(stem + own, params, (), name) if is_search else make_group(stem + own, params, name))
    return groups


@pytest.mark.slow
@pytest.mark.parametrize("swaps", [False, True])
def test_samples_and_beams_that_give_way_and_find_pages_get_the_same_tokens(swaps):
    """In a system that reserves a piece for each sequence, all pages stay."""
    expected = run_checked(some_engine(kv_cache="contiguous-max", num_pages=600), mixed_groups())
    way = PreemptionConfig("swap", 60, transfer_pages=8) if swaps else PreemptionConfig()
    num_pages = most_pages_of(mixed_groups(), 4, WINDOW) + 10
    engine = some_engine(num_pages=num_pages, async_scheduling=False, preemption=way, prefix_caching=True)
    for _ in range(2):  # the second run begins with what the first has left
        assert run_poisoned(engine, mixed_groups()) == expected
        assert engine.stats.preemptions and engine.stats.cached_tokens
