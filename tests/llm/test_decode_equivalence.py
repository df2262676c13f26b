"""One model over any cache: dense, paged and full recomputation decode the same, whatever the pages are called."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import all_but_slow, greedy_tokens
from toy import TOY, random_prompts, toy_params

from jaxpaged.config import CacheConfig, RopeConfig
from jaxpaged.device.attention import REFERENCE
from jaxpaged.device.cache import PagedCache, make_paged_cache
from jaxpaged.device.dense_cache import DenseCache, make_dense_cache
from jaxpaged.device.steps import Carried, decode_parts, decode_step, prefill_step
from jaxpaged.step_io import DecodeBatch, DecodeInputs, PrefillBatch, PrefillInputs, SamplingInputs, pack

STEPS = 6
CONFIGS = {
    "llama": TOY,
    "windows and soft caps": dataclasses.replace(
        TOY, sliding_window=7, sliding_layers=(True, False), attention_soft_cap=3.0, final_soft_cap=5.0,
        local_rope=RopeConfig(theta=100.0), norm_placement="sandwich", qk_norm=True,
    ),
}  # fmt: skip


def recompute(config, prompt: list[int]) -> list[int]:
    """Greedy continuation without any cache: everything again for every token."""
    return greedy_tokens(toy_params(config), config, prompt, STEPS, padded_len=32)


def greedy(rows: int) -> SamplingInputs:
    return SamplingInputs(np.zeros((rows, 2), np.int32), np.zeros(rows, np.int32), np.zeros(rows, np.int32))


def decode(config, cache, tables, page_size, prompts) -> list[list[int]]:
    """Feed prompts and continuations one token at a time; the last row is padding."""
    step = functools.partial(decode_step, config=config, kernels=REFERENCE)
    parts = decode_parts(toy_params(config), config, is_async=True)
    outputs: list[list[int]] = [[] for _ in prompts]
    for position in range(max(map(len, prompts)) + STEPS - 1):
        known = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
        live = [position < len(prompt) + STEPS - 1 for prompt in prompts]
        tokens = [known[i][position] if live[i] else 0 for i in range(len(prompts))]
        slots = [tables[i, position // page_size] * page_size + position % page_size if live[i] else 0
                 for i in range(len(prompts))]  # fmt: skip
        lens = [position + 1 if alive else 0 for alive in live]
        inputs = DecodeInputs(
            *(np.array([*values, 0], np.int32) for values in (tokens, [position] * len(prompts), slots)),
            np.vstack([tables, np.zeros_like(tables[:1])]), np.array([*lens, 0], np.int32),
        )  # fmt: skip
        packed, layout = pack(DecodeBatch(inputs, greedy(len(prompts) + 1)))
        results, cache = step(parts, cache, Carried(np.zeros(8, np.int32)), packed, layout=layout)
        for i, prompt in enumerate(prompts):
            if live[i] and position >= len(prompt) - 1:
                outputs[i].append(int(results.columns[i, 0]))
    return outputs


def poisoned(cache, tables):
    """NaN in every page but NULL_PAGE's that no table names, and in what no row has written yet."""

    def spoil(pool):
        named = np.isin(np.arange(pool.shape[0]), tables)
        return jnp.where(jnp.asarray(named)[:, None, None, None], pool, jnp.nan).at[0].set(jnp.nan)

    return dataclasses.replace(cache, k=tuple(map(spoil, cache.k)), v=tuple(map(spoil, cache.v)))


def poisoned_rows(cache):
    """NaN in every row of a dense cache: none of them is NULL_PAGE's."""
    return jax.tree.map(lambda pool: jnp.full_like(pool, jnp.nan), cache)


@pytest.mark.parametrize("name", all_but_slow(CONFIGS, "windows and soft caps"))
def test_dense_paged_and_recomputation_agree(name):
    config = CONFIGS[name]
    prompts = random_prompts(4, low=1, high=19, seed=3)
    expected = [recompute(config, prompt) for prompt in prompts]

    for page_size, num_rows in [(32, 5), (8, 5), (8, 9)]:  # as many rows as the step has with its padding, and more
        pages = 32 // page_size
        dense: DenseCache = make_dense_cache(config, CacheConfig(page_size, num_rows * pages + 1, "float32"), 32)
        tables = 1 + (np.array([[4], [1], [3], [2]]) * pages + np.arange(pages)).astype(np.int32)
        assert decode(config, poisoned_rows(dense), tables, page_size, prompts) == expected

    for page_size, seed in [(4, 0), (4, 1), (16, 2), (5, 3)]:
        width = -(-32 // page_size)
        ids = 1 + np.random.default_rng(seed).permutation(4 * width + 5)[: 4 * width].reshape(4, width)
        tables = ids.astype(np.int32)
        paged = make_paged_cache(config, CacheConfig(page_size, 4 * width + 6, "float32"))
        assert decode(config, poisoned(paged, tables), tables, page_size, prompts) == expected


def test_one_prefill_computes_what_many_decode_steps_do():
    prompts = random_prompts(3, low=5, high=19, seed=5)
    tables = 1 + np.arange(24, dtype=np.int32).reshape(3, 8)
    counts = np.array([len(prompt) for prompt in prompts] + [0], np.int32)
    starts = (np.cumsum(counts) - counts).astype(np.int32)
    positions = np.concatenate([np.arange(count) for count in counts])
    rows = np.repeat(np.arange(4), counts)
    inputs = PrefillInputs(
        tokens=np.concatenate(prompts).astype(np.int32), positions=positions.astype(np.int32),
        slot_mapping=(tables[rows, positions // 4] * 4 + positions % 4).astype(np.int32),
        block_tables=np.vstack([tables, np.zeros_like(tables[:1])]), query_starts=starts, query_lens=counts,
        context_lens=counts, sample_from=np.maximum(starts + counts - 1, 0).astype(np.int32),
    )  # fmt: skip
    packed, layout = pack(PrefillBatch(inputs, greedy(4)))
    cache: PagedCache = poisoned(make_paged_cache(TOY, CacheConfig(4, 30, "float32")), tables)
    results, _ = prefill_step(
        toy_params(), cache, Carried(np.zeros(8, np.int32)), packed, config=TOY, kernels=REFERENCE, layout=layout
    )
    assert np.asarray(results.columns)[:3, 0].tolist() == [recompute(TOY, prompt)[0] for prompt in prompts]
