"""A mixed step computes what a decode step and a prefill step compute one after the other."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import all_but_slow
from toy import TOY, toy_params

from jaxpaged.config import CacheConfig, EngineConfig
from jaxpaged.device import steps
from jaxpaged.device.attention import REFERENCE, AttentionKernels
from jaxpaged.device.cache import make_paged_cache
from jaxpaged.device.params import param_shapes
from jaxpaged.engine.lowering import static_arguments, step_to_make
from jaxpaged.host.step.batching import Buckets, StepShape, make_batch
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.host.step.step_plan import StepPlan
from jaxpaged.step_io import (
    DecodeBatch,
    DecodeInputs,
    MixedBatch,
    MixedInputs,
    PrefillBatch,
    PrefillInputs,
    SamplingInputs,
    of_row,
    pack,
)

PAGE_SIZE, WIDTH, NUM_PAGES = 4, 6, 60
ROWS = 5  # three that decode and two of padding
CONTEXTS = [9, 1, 16]  # of these, the new token included
CHUNKS = [(0, 7), (6, 5), (8, 12)]  # start and length; the last fills pages up to the end
TOKENS = 29  # 24, and padding
FEATURES = {
    "windows and soft caps": dict(
        sliding_window=7, sliding_layers=(True, False), attention_soft_cap=3.0, norm_placement="sandwich", qk_norm=True
    ),
    "llama": {},
}


def greedy(rows: int) -> SamplingInputs:
    return SamplingInputs(np.zeros((rows, 2), np.int32), np.zeros(rows, np.int32), np.zeros(rows, np.int32))


def padded(values, size) -> np.ndarray:
    array = np.zeros((size, *np.shape(values)[1:]), np.int32)
    array[: len(values)] = values
    return array


def make_inputs(rng) -> tuple[DecodeInputs, PrefillInputs]:
    """Over pages in any order; the second row's token is what row 3 of the step before has chosen."""
    tables = 1 + rng.permutation(NUM_PAGES - 1)[: 6 * WIDTH].reshape(6, WIDTH).astype(np.int32)
    own, others = tables[:3], tables[3:]
    positions = np.array(CONTEXTS) - 1
    slots = own[np.arange(3), positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
    decode = DecodeInputs(
        tokens=padded([5, of_row(3), 7], ROWS), positions=padded(positions, ROWS), slot_mapping=padded(slots, ROWS),
        block_tables=padded(own, ROWS), context_lens=padded(CONTEXTS, ROWS),
    )  # fmt: skip
    starts, counts = (np.array(column) for column in zip(*CHUNKS, strict=True))
    rows = np.repeat(np.arange(3), counts)
    positions = np.concatenate([np.arange(start, start + count) for start, count in CHUNKS])
    slots = others[rows, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
    ends = np.cumsum(counts)
    prefill = PrefillInputs(
        tokens=padded(rng.integers(0, TOY.vocab_size, len(rows)), TOKENS), positions=padded(positions, TOKENS),
        slot_mapping=padded(slots, TOKENS), block_tables=padded(others, 4), query_starts=padded(ends - counts, 4),
        query_lens=padded(counts, 4), context_lens=padded(starts + counts, 4),
        sample_from=padded(ends - 1, ROWS),
    )  # fmt: skip
    return decode, prefill


def make_pool(config, rng, decode, prefill):
    """Numbers where rows have been, NaN in all else: other pages, NULL_PAGE, and positions that are not written yet."""
    known = np.zeros((NUM_PAGES, PAGE_SIZE), bool)
    lens = [length - 1 for length in CONTEXTS] + [start for start, _ in CHUNKS]
    for table, length in zip(np.vstack([decode.block_tables[:3], prefill.block_tables[:3]]), lens, strict=True):
        for position in range(length):
            known[table[position // PAGE_SIZE], position % PAGE_SIZE] = True

    def filled(pool):
        values = rng.normal(size=pool.shape).astype(np.float32)
        return jnp.asarray(np.where(known[:, :, None, None], values, np.nan))

    return jax.tree.map(filled, make_paged_cache(config, CacheConfig(PAGE_SIZE, NUM_PAGES, "float32")))


@pytest.mark.parametrize("name", all_but_slow(FEATURES, "windows and soft caps"))
def test_it_is_a_decode_step_and_a_prefill_step(name):
    config = dataclasses.replace(TOY, **FEATURES[name])
    rng = np.random.default_rng(3)
    decode, prefill = make_inputs(rng)
    pool = make_pool(config, rng, decode, prefill)
    params, carried = toy_params(config), steps.Carried(np.array([0, 0, 0, 42, 0, 0, 0, 0], np.int32))

    def run(step, weights, cache, batch):
        packed, layout = pack(batch)
        return step(weights, cache, carried, packed, config=config, kernels=REFERENCE, layout=layout)

    parts = steps.decode_parts(params, config, is_async=True)
    copy = jax.tree.map(jnp.array, pool)
    decoded, copy = run(steps.decode_step, parts, copy, DecodeBatch(decode, greedy(ROWS)))
    prefilled, copy = run(steps.prefill_step, params, copy, PrefillBatch(prefill, greedy(ROWS)))

    # What decodes is sampled from first, then the prompts, of which the second goes on in a later step.
    places = padded([0, 1, 2, ROWS + 6, ROWS + 23], ROWS)
    inputs = MixedInputs(decode, prefill._replace(sample_from=places))
    mixed, pool = run(steps.mixed_step, params, pool, MixedBatch(inputs, greedy(ROWS)))

    expected = np.vstack([np.asarray(decoded.columns)[:3], np.asarray(prefilled.columns)[[0, 2]]])
    columns = np.asarray(mixed.columns)
    assert columns[:, 0].tolist() == expected[:, 0].tolist() and (columns[:, 0] >= 0).all()
    np.testing.assert_allclose(columns[:, 1].view(np.float32), expected[:, 1].view(np.float32), atol=1e-4)
    assert np.asarray(mixed.carried.tokens).tolist() == [*columns[:, 0].tolist(), 0, 0, 0]
    for ours, theirs in zip(jax.tree.leaves(pool), jax.tree.leaves(copy), strict=True):
        np.testing.assert_allclose(ours[1:], theirs[1:], atol=1e-4)  # but for NULL_PAGE, where padding writes


def test_the_pool_is_updated_in_place():
    limits, cache = EngineConfig(256, 8, 64), CacheConfig(16, 2000, "float32")
    shape = Buckets.for_limits(limits, cache).mixed_shapes()[-1]
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    lowered = step_to_make(shape, TOY, "float32", cache, REFERENCE, SamplingFeatures(), sharding, limits).lower()
    memory = lowered.compile().memory_analysis()
    pool_bytes = cache.num_pages * cache.page_size * TOY.kv_bytes_per_token(4)
    assert memory.alias_size_in_bytes == pool_bytes
    assert memory.temp_size_in_bytes < 0.1 * pool_bytes


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")
def test_it_lowers_for_cuda_without_a_gpu():
    """With the kernels of both, of which decode has one over pages and one that merges its parts; and two around."""
    from pallas_kernels.add_norm import add_norm
    from pallas_kernels.paged_decode import paged_decode
    from pallas_kernels.paged_prefill import paged_prefill
    from pallas_kernels.write_heads import write_heads

    model = dataclasses.replace(TOY, num_heads=24, num_kv_heads=8, head_dim=128, hidden_size=1024)
    cache, features, shape = CacheConfig(16, 64), SamplingFeatures(), StepShape(64, 16, 512, 64)
    packed, layout = pack(make_batch(StepPlan(is_prefill=True), shape, cache, model.vocab_size, features))
    kernels = AttentionKernels("pallas", paged_decode, paged_prefill, write_heads=write_heads, add_norm=add_norm)
    pool = jax.eval_shape(lambda: make_paged_cache(model, cache))
    step = functools.partial(steps.mixed_step.__wrapped__, **static_arguments(model, kernels, layout, features))
    carried = steps.Carried(jax.ShapeDtypeStruct((64,), jnp.int32))
    traced = jax.jit(step).trace(param_shapes(model, "bfloat16"), pool, carried, packed)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("custom_call @mosaic_gpu") == 5
