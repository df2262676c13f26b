"""Constrained requests whatever becomes of them: with few pages, pages that are known, prompts beside them, or other
systems of memory they end with the tokens that they have in an endless pool."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from helpers import all_but_slow
from scripted_device import most_pages_of
from toy import beam_group, char_tokenizer, few_programs, make_group, random_prompts, run_checked, toy_engine

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.constraint import Regex
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.api.trie import Trie
from jaxpaged.config import PreemptionConfig
from jaxpaged.host.constraints.in_text import TextLimit
from jaxpaged.host.constraints.in_trie import TrieLimit
from jaxpaged.text.matching import Matchers, fill_masks
from jaxpaged.text.tokenizer import JsonTokenizer

ITEMS = np.random.default_rng(0).integers(2, 97, (3000, 3)).repeat(6, axis=1)  # long ones, which need pages
TRIE = TrieLimit(Trie.from_sequences(ITEMS))
PATTERN = "[a-f]{5,12}(xyz)+!"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("characters") / "tokenizer.json"
    char_tokenizer().save(str(path))
    return TextLimit(Matchers(JsonTokenizer(path), 97).make(Regex(PATTERN), []), fill_masks)


def limited(limits, count=12) -> list:
    """Beams, samples and greedy requests, with these limits in turn."""
    groups = []
    for i, prompt in enumerate(random_prompts(count, low=4, high=16, seed=5)):
        if i % 3 == 0:
            group = beam_group(prompt, BeamSearchParams(beam_width=3, max_tokens=20), (1,), str(i))
        else:
            params = SamplingParams(n=3, max_tokens=20) if i % 3 == 1 else SamplingParams(temperature=0, max_tokens=20)
            group = make_group(prompt, params, str(i), seed=i)
        group.limit = limits[i % len(limits)]
        if group.limit is not None:
            group.sequences[0].place = group.limit.begin()
            for state in group.beams:
                state.places = group.limit.begin_beams(state.width)
        groups.append(group)
    return groups


def engine(is_tight=False, **options):
    """`is_tight`: only the pages that the largest request needs are given out, of a pool as large as any other."""
    made = few_programs(toy_engine(**{"num_pages": 600, "max_num_seqs": 16, **options}))
    if is_tight:
        few = 1 + most_pages_of(limited([TRIE]), page_size=4)
        made.cache_config = dataclasses.replace(made.cache_config, num_pages=few)
    return made


RUNS = {
    "swapped": dict(is_tight=True, preemption=PreemptionConfig("swap", swap_pages=400, transfer_pages=16)),
    "recomputed": dict(is_tight=True, preemption=PreemptionConfig("recompute")),
    "known": dict(prefix_caching=True),
    "waiting": dict(async_scheduling=False),
    "dense": dict(kv_cache="dense"),
    "without a cache": dict(kv_cache="none", max_num_batched_tokens=256),
}


@pytest.fixture(scope="module")
def expected():
    found = run_checked(engine(), limited([TRIE, None]))
    assert all(TRIE.is_complete(output) for i in range(0, 12, 2) for output in found[str(i)])
    return found


@pytest.mark.parametrize("name", all_but_slow(RUNS, "swapped", "recomputed", "known"))
def test_in_a_trie(expected, name):
    constrained = engine(**RUNS[name])
    for again in range(2 if name == "known" else 1):
        assert run_checked(constrained, limited([TRIE, None])) == expected, again
    assert bool(constrained.stats.preemptions) == (name in ("swapped", "recomputed"))


@pytest.mark.parametrize("name", all_but_slow(RUNS))
def test_in_a_text(text, name):
    limits = [text, TRIE, None]
    assert run_checked(engine(**RUNS[name]), limited(limits)) == run_checked(engine(), limited(limits))


@pytest.mark.slow
@pytest.mark.parametrize("tokens_a_step", [64, 32])
def test_samples_ahead_of_the_host_and_beside_prompts(expected, tokens_a_step):
    ahead = engine(max_num_batched_tokens=tokens_a_step, max_num_seqs=4)
    samples = [group for group in limited([TRIE, None]) if not group.beams]
    assert run_checked(ahead, samples) == {group.request_id: expected[group.request_id] for group in samples}
    assert ahead.stats.mixed_steps > 0
