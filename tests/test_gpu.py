"""What only a GPU can show: the same tokens as transformers', the pool in place, the memory that is really there.

The rest of the suite runs on a GPU too, when JAX finds one: `pytest` there, or `pytest -m gpu` for this file alone.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_greedy_tokens_of_llm
from toy import TOY, make_group, random_prompts, run_tokens, toy_engine, toy_params

from jaxpaged import LLM, SamplingParams
from jaxpaged.config import CacheConfig
from jaxpaged.device import steps
from jaxpaged.device.attention import REFERENCE
from jaxpaged.device.cache import make_paged_cache
from jaxpaged.step_io import DecodeBatch, DecodeInputs, SamplingInputs, pack
from pallas_kernels import reference

pytestmark = pytest.mark.gpu
GOLDENS = Path(__file__).parent / "goldens"


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDENS.iterdir()))
def test_greedy_tokens_equal_transformers(name):
    check_greedy_tokens_of_llm(GOLDENS / name)


def test_samples_do_not_depend_on_batch_page_size_or_preemption():
    def groups():
        params = [SamplingParams(temperature=0, max_tokens=18), SamplingParams(n=3, top_p=0.9, max_tokens=20)]
        return [make_group(prompt, params[i % 2], str(i), seed=i) for i, prompt in enumerate(random_prompts(12))]

    expected = run_tokens(toy_engine(num_pages=400, max_num_seqs=32, max_num_batched_tokens=512), groups())
    assert run_tokens(toy_engine(num_pages=200, page_size=16), groups()) == expected
    tight = toy_engine(num_pages=40, page_size=4)
    assert run_tokens(tight, groups()) == expected
    assert tight.stats.preemptions > 0


def test_the_pool_is_updated_in_place():
    cache = make_paged_cache(TOY, CacheConfig(16, 20_000, "bfloat16"))
    pool_bytes = sum(pool.nbytes for pool in (*cache.k, *cache.v))
    zeros = np.zeros(8, np.int32)
    inputs = DecodeInputs(zeros, zeros, zeros, np.zeros((8, 32), np.int32), zeros + 1)
    packed, layout = pack(DecodeBatch(inputs, SamplingInputs(np.zeros((8, 2), np.int32), zeros, zeros)))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), toy_params())
    compiled = steps.decode_step.lower(params, cache, packed, config=TOY, kernels=REFERENCE, layout=layout).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < 0.1 * pool_bytes


def test_16_bit_attention_is_close_to_float32():
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (8, 32, 128), jnp.bfloat16)
    k, v = (jax.random.normal(key, (200, 16, 8, 128), jnp.bfloat16) for key in keys[1:])
    tables = jnp.arange(1, 193, dtype=jnp.int32).reshape(8, 24)
    lens = jnp.array([0, 1, 15, 16, 17, 100, 383, 384], jnp.int32)
    out = reference.paged_decode(q, k, v, tables, lens, scale=0.1)
    exact = reference.paged_decode(*(x.astype(jnp.float32) for x in (q, k, v)), tables, lens, scale=0.1)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=2e-2)


def test_the_default_pool_fits_the_device():
    llm = LLM(GOLDENS / "llama_tied", max_num_seqs=256)
    stats = jax.devices()[0].memory_stats()
    assert stats["bytes_in_use"] <= 0.92 * stats["bytes_limit"]
    assert llm.generate([[1, 2, 3]], SamplingParams(temperature=0))[0].finished
