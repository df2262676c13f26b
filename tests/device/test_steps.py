"""The compiled steps: one program a bucket, the pool updated in place, arrays packed and unpacked without loss."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from helpers import all_but_slow
from toy import TOY, few_programs, make_group, random_prompts, run_tokens, toy_engine, toy_params

from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.config import CacheConfig
from jaxpaged.device import steps
from jaxpaged.device.attention import REFERENCE
from jaxpaged.device.cache import make_paged_cache
from jaxpaged.step_io import DecodeBatch, DecodeInputs, SamplingInputs, pack


def decode_batch(rows=4, width=16) -> DecodeBatch:
    zeros = np.zeros(rows, np.int32)
    return DecodeBatch(
        DecodeInputs(zeros, zeros, zeros, np.zeros((rows, width), np.int32), zeros + 1),
        SamplingInputs(np.zeros((rows, 2), np.int32), zeros, zeros),
    )


@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn"])
def test_the_pool_is_donated_and_updated_in_place(dtype):
    cache = make_paged_cache(TOY, CacheConfig(16, 2000, dtype))
    pool_bytes = sum(pool.nbytes for pool in (*cache.k, *cache.v))
    (packed, layout), carried = pack(decode_batch()), steps.Carried(np.zeros(8, np.int32))
    static = dict(config=TOY, kernels=REFERENCE, layout=layout)
    whole = steps.decode_layers.lower(toy_params(), cache, None, carried, packed, layers=(0, TOY.num_layers), **static)
    memory = whole.compile().memory_analysis()
    assert memory.alias_size_in_bytes == pool_bytes
    assert memory.temp_size_in_bytes < 0.1 * pool_bytes
    parts = steps.decode_parts(toy_params(), TOY, is_async=True)
    _, new_cache = steps.decode_step(parts, cache, carried, packed, **static)
    assert all(pool.is_deleted() for pool in (*cache.k, *cache.v))
    assert not any(pool.is_deleted() for pool in (*new_cache.k, *new_cache.v))


def test_copies_are_carried_out_in_every_layer():
    cache = make_paged_cache(TOY, CacheConfig(2, 6, "float32"))
    cache = jax.tree.map(lambda pool: pool.at[:].set(np.arange(6, dtype=np.float32)[:, None, None, None]), cache)
    copied = steps.copy_pages(cache, np.array([[1, 2, 0], [4, 5, 0]], np.int32), kernels=REFERENCE)
    for pool in (*copied.k, *copied.v):
        np.testing.assert_array_equal(pool[:, 0, 0, 0], [0, 1, 2, 3, 1, 2])


def test_a_step_begins_with_its_copies(monkeypatch):
    """In a run with samples every decode step takes its list of copies along, and nothing is launched to copy. A mixed
    step, which takes long beside a launch, has no such list."""
    expected = run_tokens(few_programs(toy_engine()), workload(seed=1))
    engine = few_programs(toy_engine(kernels=REFERENCE._replace(copies_in_steps=True), mixed_steps=False))
    monkeypatch.setattr(engine.runner, "copy_arrays", lambda copies: pytest.fail("copies were launched alone"))
    assert run_tokens(engine, workload(seed=1)) == expected
    assert engine.stats.page_copies > 0


def test_more_copies_than_rows_are_made_before_the_step():
    """Sequences in chunks are copied whole when they fork, which is more than the step's list holds."""
    kernels = REFERENCE._replace(copies_in_steps=True)
    expected = run_tokens(few_programs(toy_engine(num_pages=400)), workload(seed=1))
    engine = few_programs(toy_engine(num_pages=400, kv_cache="contiguous-max", kernels=kernels))
    launched = []
    runner = engine.runner
    runner.copy_arrays, copy = lambda copies: launched.append(copy(copies)), runner.copy_arrays
    assert run_tokens(engine, workload(seed=1)) == expected
    assert launched


@pytest.mark.parametrize("kv_cache", all_but_slow(["paged", "dense"], "paged"))
def test_a_deep_model_that_is_waited_for_decodes_in_two_programs(monkeypatch, kv_cache):
    """With the same tokens, and copies in both parts of the pool."""
    kernels = REFERENCE._replace(copies_in_steps=True)
    expected = run_tokens(few_programs(toy_engine(num_pages=400, kv_cache=kv_cache)), workload(seed=1))
    monkeypatch.setattr(steps, "DEEP", TOY.num_layers)
    monkeypatch.setattr(steps, "FIRST_SHARE", 0.5)
    launched, decode_layers = set(), steps.decode_layers

    def launch(*args, layers, **static):
        launched.add(layers)
        return decode_layers(*args, layers=layers, **static)

    launch.to_make = decode_layers.to_make
    monkeypatch.setattr(steps, "decode_layers", launch)
    engine = few_programs(toy_engine(num_pages=400, kv_cache=kv_cache, kernels=kernels, async_scheduling=False))
    assert run_tokens(engine, workload(seed=1)) == expected
    assert launched == {(0, 1), (1, 2)}


def test_packing_loses_nothing():
    batch = decode_batch()
    batch = batch._replace(sampling=batch.sampling._replace(temperatures=np.float32([0.5, np.nan, -np.inf, 1e-40])))
    packed, layout = pack(batch)
    assert packed.dtype == np.int32 and packed.ndim == 1
    unpacked = steps.unpack(packed, layout)
    np.testing.assert_array_equal(unpacked.sampling.temperatures, batch.sampling.temperatures)
    assert unpacked.sampling.top_ps is None
    for ours, theirs in zip(unpacked.inputs, batch.inputs, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def workload(seed):
    params = [
        SamplingParams(temperature=0, max_tokens=9),
        SamplingParams(temperature=0.5 + seed / 10, n=3, max_tokens=7),
    ]
    prompts = random_prompts(3 + seed, 3, 20 + 10 * seed, seed)
    return [make_group(prompt, params[i % 2], str(i), seed=i) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("copies_in_steps", all_but_slow([False, True], True))
def test_nothing_is_compiled_after_warm_up(copies_in_steps):
    """Any number of prompts of any length, greedy and sampled, with preemptions: the programs are there."""
    kernels = REFERENCE._replace(copies_in_steps=copies_in_steps)
    engine = toy_engine(num_pages=60, page_size=4, max_num_seqs=8, max_num_batched_tokens=64, kernels=kernels)
    engine.warm_up(workload(seed=0))
    for seed in range(4):
        run_tokens(engine, workload(seed))
        assert engine.stats.steps > 0
        assert engine.stats.programs_made == 0, f"workload {seed} made {engine.stats.programs_made} programs"


@pytest.mark.parametrize("kv_cache", all_but_slow(["dense", "dense-static-global", "none"], "dense"))
def test_nor_for_the_systems_that_paging_is_compared_with(kv_cache):
    engine = toy_engine(
        num_pages=160, page_size=4, max_num_seqs=8, max_num_batched_tokens=256, max_model_len=64, kv_cache=kv_cache
    )
    engine.warm_up(workload(seed=0))
    for seed in (0, 3):
        run_tokens(engine, workload(seed))
        assert engine.stats.steps > 0
        assert engine.stats.programs_made == 0, f"workload {seed} made {engine.stats.programs_made} programs"


def test_the_compilation_counter_counts():
    engine = toy_engine(num_pages=61, max_num_seqs=8)
    run_tokens(engine, workload(seed=0))
    assert engine.stats.programs_made > 0
