"""`kv_cache_dtype="fp8"` from the API: twice the tokens in a pool, and the tokens of a model that rounds its keys and
values, whatever else pages do."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import attend_qkv
from toy import TOY, random_prompts, save_toy_checkpoint, toy_params

from jaxpaged import LLM, BeamSearchParams, SamplingParams
from jaxpaged.device.model import compute_logits, forward
from jaxpaged.engine import pool_size

SIZES = dict(page_size=4, max_num_seqs=8, max_num_batched_tokens=32, max_model_len=48)
LARGE = dict(SIZES, num_pages=90)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
MIXED = [
    GREEDY, SamplingParams(n=3, seed=5, max_tokens=14, ignore_eos=True), BeamSearchParams(beam_width=4, max_tokens=12),
]  # fmt: skip
PROMPTS = random_prompts(6, low=5, high=20)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_toy_checkpoint(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def llm(directory):
    return LLM(directory, kv_cache_dtype="fp8", **LARGE)


def tokens_of(llm, prompts=PROMPTS, params=None, **options):
    outputs = llm.generate(prompts, params or MIXED * 2, progress=False, **options)
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def expected(llm):
    """Where no page is ever missing."""
    tokens = tokens_of(llm)
    assert llm.last_run.preemptions == 0
    return tokens


def rounded(x):
    """To a sign, four bits and an exponent from -6 to 8, by arithmetic alone."""
    x = jnp.clip(x, -448, 448)
    _, exponent = jnp.frexp(x)  # of a fraction in [0.5, 1)
    step = jnp.exp2(jnp.maximum(exponent - 1, -6).astype(x.dtype) - 3)
    return jnp.round(x / step) * step


@functools.partial(jax.jit, static_argnames="rounds")
def logits_at_the_end(tokens, length, rounds=True):
    """Of TOY with all keys and values rounded, computed from the whole text."""
    attend = attend_qkv(TOY)

    def attend_rounded(cache, layer, heads):
        q, k, v = heads.split()
        return attend(cache, layer, q, rounded(k), rounded(v)) if rounds else attend(cache, layer, q, k, v)

    positions = jnp.arange(len(tokens), dtype=jnp.int32)
    hidden, _ = forward(toy_params(), TOY, tokens, positions, None, attend_rounded)
    return compute_logits(toy_params(), TOY, hidden[length - 1][None])[0]


def greedy(prompt, rounds=True):
    tokens = list(prompt)
    for _ in range(GREEDY.max_tokens):
        padded = jnp.asarray(np.pad(np.int32(tokens), (0, 32 - len(tokens))))
        tokens.append(int(logits_at_the_end(padded, len(tokens), rounds).argmax()))
    return tokens[len(prompt) :]


def test_tokens_are_those_of_a_model_that_rounds_its_keys_and_values(llm):
    rounded_tokens = [[greedy(prompt)] for prompt in PROMPTS]
    assert tokens_of(llm, params=GREEDY) == rounded_tokens
    assert rounded_tokens != [[greedy(prompt, rounds=False)] for prompt in PROMPTS]


@pytest.mark.parametrize("preemption", [pytest.param("swap", marks=pytest.mark.slow), "recompute"])
def test_requests_that_give_way_end_with_the_same_tokens(llm, expected, preemption):
    page_bytes = 4 * 2 * 2 * 2 * 8  # a byte for each number of 4 positions
    llm.rebuild(**LARGE, preemption=preemption, swap_space_gib=60 * page_bytes / (1 << 30))
    engine = llm.engine
    engine.cache_config = dataclasses.replace(engine.cache_config, num_pages=22)  # a part of the runner's pool
    assert tokens_of(llm) == expected
    run = llm.last_run
    assert run.preemptions > 0 and run.page_copies > 0
    if preemption == "swap":
        assert run.swaps_in == run.swaps_out > 0
        assert llm.engine.limits.preemption.swap_pages == 60
        assert llm.engine.runner.page_bytes == page_bytes and run.swapped_out_bytes % page_bytes == 0


def test_a_prefix_is_computed_once_with_the_same_tokens(llm):
    llm.rebuild(**LARGE, preemption="auto")
    prefix = PROMPTS[0][:7]  # ends within a page
    whole = tokens_of(llm, [prefix + prompt for prompt in PROMPTS])
    assert tokens_of(llm, shared_prefix=prefix) == whole


def test_pieces_that_are_reserved_beforehand_hold_fp8_too(llm, expected):
    llm.rebuild(**LARGE, kv_cache="contiguous-max")
    try:
        assert tokens_of(llm) == expected
    finally:
        llm.rebuild(**LARGE, kv_cache="paged")


def test_a_tree_forks_and_appends_on_fp8_pages(llm):
    prompt, found = PROMPTS[0], []
    with llm.tree() as tree:
        node = tree.fork(tree.open(prompt))
        likeliest = tree.next_tokens(node)
        for _ in range(3):
            found.append(int(likeliest.logprobs[0].argmax()))
            likeliest = tree.append(node, [found[-1]])
        assert tree.stats().copies == 1
    assert found == greedy(prompt)[:3]


def test_a_pool_of_the_same_memory_has_twice_the_pages(directory, monkeypatch):
    monkeypatch.setattr(pool_size, "CPU_POOL_BYTES", 1 << 16)
    fits = {}
    for kv_cache_dtype in ("auto", "fp8", "fp8_e4m3"):
        llm = LLM(directory, dtype="bfloat16", kv_cache_dtype=kv_cache_dtype, max_num_seqs=64, page_size=4)
        fits[kv_cache_dtype] = llm.engine.cache_config.num_pages
        assert llm.engine.dtype == "bfloat16"
    assert fits == {"auto": 128, "fp8": 256, "fp8_e4m3": 256}
