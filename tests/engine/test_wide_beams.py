"""Beams as arrays on the device, ahead of the host: the hypotheses of a search that is computed anew at every step."""

from __future__ import annotations

import numpy as np
import pytest
from beam_reference import beam_search
from helpers import reference_model
from toy import beam_group, cascade_engine, few_programs, make_group, random_prompts, toy_engine

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.config import PreemptionConfig
from jaxpaged.engine.engine import Engine
from jaxpaged.host.beams.beam_state import best_hypotheses
from jaxpaged.host.sequence import SequenceGroup
from jaxpaged.step_io import DecodeBatch

ENDS = (1, 2)


def found(engine: Engine, groups: list[SequenceGroup]) -> dict[str, list]:
    results = {}
    for group in engine.run(groups):
        results[group.request_id] = (
            [(h.token_ids, round(h.score, 4)) for h in best_hypotheses(group.beams, 10_000)]
            if group.beams
            else [sequence.output_ids for sequence in group.sequences]
        )
        engine.scheduler.check_invariants()
    assert engine.scheduler.allocator.num_used == 0
    return results


def requests() -> list[SequenceGroup]:
    """Searches of several widths and lengths, beside samples, so that rows come and go."""
    prompts = random_prompts(7, low=1, high=21, seed=5)
    kinds = [
        BeamSearchParams(beam_width=6, max_tokens=14),
        SamplingParams(n=3, max_tokens=9, temperature=1.0),
        BeamSearchParams(beam_width=2, max_tokens=17, early_stopping=True, repetition_penalty=1.3),
        BeamSearchParams(beam_width=5, max_tokens=12, do_sample=True, temperature=0.9, seed=3),
        SamplingParams(temperature=0, max_tokens=16),
        BeamSearchParams(beam_width=1, max_tokens=6, logit_bias={5: 3.0}, min_tokens=3),
        BeamSearchParams(beam_width=7, max_tokens=10, early_stopping="never", allowed_token_ids=list(range(60))),
    ]
    return [
        beam_group(prompt, params, ENDS, str(i))
        if isinstance(params, BeamSearchParams)
        else make_group(prompt, params, str(i), seed=i)
        for i, (prompt, params) in enumerate(zip(prompts, kinds, strict=True))
    ]


@pytest.fixture(scope="module")
def engine():
    return few_programs(toy_engine(num_pages=300, max_num_seqs=32))


def one_by_one(engine: Engine, groups: list[SequenceGroup], monkeypatch) -> dict[str, list]:
    """With a sequence for every beam, and the host choosing before each step."""
    begin = Engine._begin_loop

    def begin_waiting(self, *args):
        loop = begin(self, *args)
        loop._is_async = False
        return loop

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_begin_loop", begin_waiting)
        patch.setattr("jaxpaged.host.beams.beam_groups.can_gather", lambda group: False)
        return found(engine, groups)


@pytest.fixture(scope="module")
def expected(engine):
    with pytest.MonkeyPatch.context() as patch:
        return one_by_one(engine, requests(), patch)


def test_steps_that_go_on_ahead_find_what_waiting_ones_find(engine, expected):
    steps = []
    launch = engine.runner.launch
    engine.runner.launch = lambda step: (steps.append(step.keeps_beams), launch(step))[1]
    try:
        assert found(engine, requests()) == expected
    finally:
        del engine.runner.launch
    assert sum(steps) >= len(steps) / 3, "few steps went on from what the device had"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_in_a_pool_that_is_too_small_for_all_they_give_way_and_find_the_same(mode, expected):
    preemption = PreemptionConfig(mode, swap_pages=200, transfer_pages=4)
    tight = few_programs(toy_engine(num_pages=44, max_num_seqs=32, preemption=preemption))
    assert found(tight, requests()) == expected
    assert tight.stats.preemptions > 0 and (tight.stats.swaps_out > 0) == (mode == "swap")


@pytest.mark.slow
def test_known_pages_of_the_prompt_are_shared_and_never_written(engine, expected):
    caching = few_programs(toy_engine(num_pages=300, max_num_seqs=32, prefix_caching=True))
    for _ in range(2):
        assert found(caching, requests()) == expected
    assert caching.stats.cached_tokens > 0


@pytest.mark.slow
def test_one_prompt_is_read_once_for_all_beams_and_the_same_is_found(engine):
    prompt = random_prompts(1, low=22, high=22)[0]

    def search() -> list[SequenceGroup]:
        return [beam_group(prompt, BeamSearchParams(beam_width=12, max_tokens=11), ENDS)]

    sharing = few_programs(cascade_engine(num_pages=300, max_num_seqs=32))
    shared = []
    ready = sharing.runner._ready
    sharing.runner._ready = lambda *args: (shared.append(ready(*args)), shared[-1])[1]
    assert found(sharing, search()) == found(engine, search())
    decoded = [batch.inputs for batch in shared if isinstance(batch, DecodeBatch)]
    assert decoded and all(inputs.cascade_groups is not None for inputs in decoded)
    assert all((inputs.cascade_groups.own_starts[:12] == 20).all() for inputs in decoded), "more than the prompt"


def test_beams_are_counted_as_they_are(engine):
    """Pages of the pool, entries of tables, copies: of steps that are planned ahead too."""
    prompt = random_prompts(1, low=6, high=6)[0]
    group = beam_group(prompt, BeamSearchParams(beam_width=5, max_tokens=13, early_stopping="never"), ())
    found(engine, [group])
    stats = engine.stats
    assert stats.running.tolist() == [1] + [5] * 12
    assert stats.logical_pages.tolist() == [2] + [5 * -(-(7 + i) // 4) for i in range(12)]
    assert stats.page_copies == group.pages.copied == stats.memory.copied_pages.sum() > 12
    assert stats.num_generated_tokens == 1 + 5 * 12
    account = stats.memory
    assert (account.used + account.internal + account.cached + account.free == account.num_slots).all()


@pytest.mark.slow
def test_tables_and_histories_become_wider_on_the_device(expected, monkeypatch):
    monkeypatch.setattr("jaxpaged.host.step.batching.NARROWEST_TABLE", 2)
    engine = few_programs(toy_engine(num_pages=300, max_num_seqs=32))
    assert len(engine.runner.buckets.table_widths) > 2
    assert found(engine, requests()[:4]) == {name: expected[name] for name in "0123"}


@pytest.mark.slow
@pytest.mark.parametrize("tile", [512, 100])
def test_512_beams_find_what_computing_everything_anew_finds(monkeypatch, tile):
    monkeypatch.setattr("jaxpaged.device.beam_candidates.TILE", tile)
    engine = few_programs(toy_engine(num_pages=2000, max_num_seqs=512))
    prompt = random_prompts(1, low=9, high=9)[0]
    results = found(engine, [beam_group(prompt, BeamSearchParams(beam_width=512, max_tokens=6), ENDS)])["0"]
    expected = beam_search(reference_model, prompt, 512, 6, set(ENDS))
    assert [tokens for tokens, _ in results] == [tokens[len(prompt) :] for tokens, _, done in expected if done]
    np.testing.assert_allclose([s for _, s in results], [s for _, s, done in expected if done], atol=1e-4)


@pytest.mark.parametrize(
    "widths, gathers",
    [
        ([3, 7, 2, 4], True),
        pytest.param([3, 7, 2, 4], False, marks=pytest.mark.slow),
        pytest.param([2, 5, 9], True, marks=pytest.mark.slow),
        pytest.param([8, 3], True, marks=pytest.mark.slow),
    ],
)
def test_a_list_of_widths_has_one_a_step(engine, monkeypatch, widths, gathers):
    prompt = random_prompts(1, low=7, high=7, seed=2)[0]
    params = BeamSearchParams(beam_width=widths, max_tokens=8)
    assert params.num_returned == widths[-1] and params.num_samples == max(widths)
    search = [beam_group(prompt, params, ENDS)]
    results = found(engine, search) if gathers else one_by_one(engine, search, monkeypatch)
    expected = [
        (tokens[7:], score)
        for tokens, score, done in beam_search(reference_model, prompt, widths, 8, set(ENDS))
        if done
    ]
    assert [tokens for tokens, _ in results["0"]] == [tokens for tokens, _ in expected]
    np.testing.assert_allclose([score for _, score in results["0"]], [score for _, score in expected], atol=1e-4)
