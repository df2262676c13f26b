"""Beam search over the paged engine against the reference with full recomputation; and what it costs in pages."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from beam_reference import beam_search
from helpers import reference_model
from toy import TOY, beam_group, make_group, random_prompts, run_tokens, toy_engine

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.host.beams.beam_state import best_hypotheses
from jaxpaged.host.sequence import SequenceGroup
from jaxpaged.host.step.features import SamplingFeatures

MAX_TOKENS = 9
PROMPTS = random_prompts(4, low=2, high=20)
#: Ids that the toy model likes: searches end at all lengths.
ENDS = (31, 94)


def searches() -> list[tuple[int, BeamSearchParams, tuple[int, ...]]]:
    """Prompt, parameters and end ids of many searches that run together."""
    grid = itertools.product((1, 2, 3, 6), (False, True, "never"), (-1.0, 0.0, 1.0, 2.0), ((), ENDS[:1], ENDS))
    return [
        (
            i % len(PROMPTS),
            BeamSearchParams(beam_width=width, max_tokens=MAX_TOKENS, early_stopping=stopping, length_penalty=penalty),
            ends,
        )
        for i, (width, stopping, penalty, ends) in enumerate(grid)
    ]


def found(engine, groups: list[SequenceGroup]) -> dict[str, list[tuple[list[int], float]]]:
    results = {}
    for group in engine.run(groups):
        if group.beams:
            best = best_hypotheses(group.beams, group.params.num_returned)
            results[group.request_id] = [(h.token_ids, h.score) for h in best]
        engine.scheduler.check_invariants()
    return results


@pytest.mark.parametrize(
    "pool",
    [
        pytest.param(dict(num_pages=400, page_size=4), marks=pytest.mark.slow),
        dict(num_pages=60, page_size=8),
    ],
)
def test_the_engine_finds_what_the_reference_finds(pool):
    cases = searches()
    groups = [beam_group(PROMPTS[p], params, ends, str(i)) for i, (p, params, ends) in enumerate(cases)]
    results = found(toy_engine(max_num_seqs=32, max_num_batched_tokens=128, **pool), groups)
    for i, (p, params, ends) in enumerate(cases):
        expected = [
            (tokens[len(PROMPTS[p]) :], score)
            for tokens, score, is_finished in beam_search(
                reference_model, PROMPTS[p], params.beam_width, MAX_TOKENS, set(ends), params.length_penalty,
                params.early_stopping,
            )
            if is_finished
        ]  # fmt: skip
        assert [tokens for tokens, _ in results[str(i)]] == [tokens for tokens, _ in expected], (i, params, ends)
        np.testing.assert_allclose([s for _, s in results[str(i)]], [s for _, s in expected], rtol=1e-5, atol=1e-4)


def mixed() -> list[SequenceGroup]:
    groups: list[SequenceGroup] = []
    for i, prompt in enumerate(random_prompts(9, low=3, high=25, seed=4)):
        if i % 3 == 0:
            groups.append(beam_group(prompt, BeamSearchParams(beam_width=2 + i // 2, max_tokens=20), ENDS, str(i)))
        else:
            params = SamplingParams(n=1 + i % 4, max_tokens=20) if i % 3 == 1 else SamplingParams(temperature=0)
            groups.append(make_group(prompt, params, str(i), seed=i))
    return groups


def results_of(engine) -> dict[str, list]:
    results = {}
    for group in engine.run(mixed()):
        results[group.request_id] = (
            [(h.token_ids, round(h.score, 3)) for h in best_hypotheses(group.beams, 99)]
            if group.beams
            else [sequence.output_ids for sequence in group.sequences]
        )
        engine.scheduler.check_invariants()
    return results


def test_beams_samples_and_greedy_requests_in_a_tight_pool_end_as_in_an_endless_one():
    expected = results_of(toy_engine(num_pages=500, max_num_seqs=64))
    tight = toy_engine(num_pages=60, page_size=4)
    assert results_of(tight) == expected
    assert tight.stats.preemptions > 0


def test_a_step_copies_a_shared_last_page_once_for_each_writer_but_one():
    engine = toy_engine(num_pages=300, page_size=4)
    group = beam_group([1, 2, 3, 4, 5], BeamSearchParams(beam_width=5, max_tokens=12), ())
    expected = 0
    with engine.step_by_hand(SamplingFeatures.of([group], TOY.vocab_size)) as loop:
        loop.scheduler.add(group)
        while loop.has_work:
            before = [(s.table.pages[-1], s.table.num_slots % 4) for s in group.sequences if s.table.pages]
            writers: dict[int, int] = {}
            for page, filled in before:
                if filled and group.is_forked:
                    writers[page] = writers.get(page, 0) + 1
            expected += sum(count - 1 for count in writers.values())
            loop.step()
            assert group.pages.copied == expected
            held = set().union(*(sequence.table.pages for sequence in group.sequences))
            assert group.pages.physical == len(held) == loop.scheduler.allocator.num_used
    assert expected > 0


def test_width_1_is_greedy():
    engine = toy_engine()
    greedy = make_group(PROMPTS[0], SamplingParams(temperature=0, max_tokens=MAX_TOKENS))
    expected = run_tokens(engine, [greedy])["0"][0]
    narrow = beam_group(PROMPTS[0], BeamSearchParams(beam_width=1, max_tokens=MAX_TOKENS), ())
    (hypotheses,) = found(engine, [narrow]).values()
    assert hypotheses[0][0] == expected
