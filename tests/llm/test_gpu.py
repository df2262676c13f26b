"""What only a GPU can show: the same tokens as transformers', the pool in place, the memory that is really there.

The rest of the suite runs on a GPU too, when JAX finds one: `pytest` there, or `pytest -m gpu` for this file alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_greedy_tokens_of_llm
from paths import ROOT
from toy import TOY, make_group, random_prompts, run_tokens, toy_engine, toy_params

from jaxpaged import LLM, SamplingParams
from jaxpaged.config import CacheConfig, PreemptionConfig
from jaxpaged.device import steps, swap
from jaxpaged.device.attention import REFERENCE
from jaxpaged.device.cache import make_paged_cache
from jaxpaged.engine.pool_size import PoolSizer
from jaxpaged.step_io import DecodeBatch, DecodeInputs, SamplingInputs, pack
from pallas_kernels import reference
from pallas_kernels.mosaic import missing_support

pytestmark = pytest.mark.gpu
GOLDENS = ROOT / "tests" / "goldens"


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDENS.iterdir() if path.is_dir()))
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


def test_groups_swap_through_pinned_memory_and_end_with_the_same_tokens():
    def groups():
        params = [SamplingParams(temperature=0, max_tokens=18), SamplingParams(n=3, top_p=0.9, max_tokens=20)]
        return [make_group(prompt, params[i % 2], str(i), seed=i) for i, prompt in enumerate(random_prompts(12))]

    expected = run_tokens(toy_engine(num_pages=400, max_num_seqs=32), groups())
    way = PreemptionConfig("swap", swap_pages=300, transfer_pages=16)
    tight = toy_engine(num_pages=40, preemption=way)
    assert swap.host_memory(tight.device).memory_kind == "pinned_host"
    assert run_tokens(tight, groups()) == expected
    assert tight.stats.swaps_out == tight.stats.swaps_in > 0 and tight.stats.recomputed_tokens == 0


def test_the_pool_is_updated_in_place():
    cache = make_paged_cache(TOY, CacheConfig(16, 20_000, "bfloat16"))
    pool_bytes = sum(pool.nbytes for pool in (*cache.k, *cache.v))
    zeros = np.zeros(8, np.int32)
    inputs = DecodeInputs(zeros, zeros, zeros, np.zeros((8, 32), np.int32), zeros + 1)
    packed, layout = pack(DecodeBatch(inputs, SamplingInputs(np.zeros((8, 2), np.int32), zeros, zeros)))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), toy_params())
    static = dict(config=TOY, kernels=REFERENCE, layout=layout, layers=(0, TOY.num_layers))
    memory = steps.decode_layers.lower(params, cache, None, zeros, packed, **static).compile().memory_analysis()
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


def test_pool_weights_and_the_largest_step_fill_their_share_of_the_device():
    device = jax.devices()[0]
    llm = LLM(ROOT / "scripts" / "shapes" / "llama-3.2-1b", load_format="dummy", max_num_seqs=64)
    engine, stats = llm.engine, device.memory_stats()
    sizer = PoolSizer(
        engine.model, engine.dtype, engine.cache_config.dtype, engine.cache_config.page_size, engine.limits, 0.9,
        engine.kernels, device, stats["bytes_limit"],
    )  # fmt: skip
    taken = stats["bytes_in_use"] + sizer.measured_step_bytes()
    assert 0.95 < taken / (0.9 * stats["bytes_limit"]) <= 1
    prompts = np.random.default_rng(0).integers(0, 1000, (3, 5000)).tolist()  # two full prefill steps
    params = SamplingParams(top_p=0.9, repetition_penalty=1.1, max_tokens=3, ignore_eos=True)
    assert all(output.finished for output in llm.generate(prompts, params))


def test_the_kernels_are_as_close_to_float32_as_the_reference_is():
    """Log-probabilities of a trained model's prompts: what 16 bits lose does not depend on who attends."""
    if missing_support(jax.devices()[0]):
        pytest.skip("the kernels need a Hopper GPU and JAX 0.11")
    prompts = ["def add(a, b):\n    return", "import os\n" * 60, "x", "class Tree:\n    def __init__(self, left):\n"]
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=0, prompt_logprobs=0, ignore_eos=True)

    def run(dtype, attention):
        llm = LLM(
            ROOT / "checkpoints" / "tiny-python", dtype=dtype, attention=attention, num_pages=300,
            max_num_batched_tokens=256,
        )  # fmt: skip
        assert llm.engine.kernels.name == attention
        return llm.generate(prompts, params)

    def read(outputs):
        """Of all prompts, and of the first token, whose context is the same however the others are chosen."""
        return np.concatenate([values(o.prompt_logprobs) + values(o.outputs[0].logprobs[:1]) for o in outputs])

    exact = read(run("float32", "reference"))
    lost, theirs = (np.abs(read(run("bfloat16", name)) - exact) for name in ("pallas", "reference"))
    assert np.sqrt(np.mean(lost**2)) < 1.3 * np.sqrt(np.mean(theirs**2)), "the kernels lose more than rounding"
    assert lost.max() < 2 * theirs.max()


def test_with_batch_invariance_log_probabilities_do_not_depend_on_the_batch_to_the_bit():
    """A long request beside seven short ones, and beside seven that are long: as many rows, so the same programs."""
    if missing_support(jax.devices()[0]):
        pytest.skip("the kernels need a Hopper GPU and JAX 0.11")
    llm = LLM(
        ROOT / "scripts" / "shapes" / "llama-3.2-1b", load_format="dummy", max_model_len=8192, num_pages=4200,
        max_num_seqs=8, max_num_batched_tokens=2048,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    asked = rng.integers(0, 1000, 4096).tolist()  # two prefill steps of its own
    short, long = (rng.integers(0, 1000, (7, length)).tolist() for length in (10, 7000))
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=5, ignore_eos=True)

    def beside(others):
        sample = llm.generate([asked, *others], params, progress=False)[0].outputs[0]
        assert llm.last_run.preemptions == 0
        return [{token: entry.logprob for token, entry in step.items()} for step in sample.logprobs]

    assert beside(short) != beside(long)
    llm.rebuild(batch_invariant=True)
    assert llm.engine.kernels.is_batch_invariant
    assert beside(short) == beside(long)


def test_batch_invariance_is_refused_where_attention_is_the_reference():
    with pytest.raises(ValueError, match="batch_invariant=True needs attention='pallas', but .* is 'reference'"):
        LLM(GOLDENS / "llama_tied", batch_invariant=True, attention="reference")


def values(logprobs) -> list[float]:
    """Of the token that is there, at every position that has one."""
    return [next(iter(entry.values())).logprob for entry in logprobs if entry]
