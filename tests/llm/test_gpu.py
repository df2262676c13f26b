"""What only a GPU can show: the same tokens as transformers', the pool in place, the memory that is really there.

The rest of the suite runs on a GPU too, when JAX finds one: `pytest` there, or `pytest -m gpu` for this file alone.
"""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_greedy_tokens_of_llm
from paths import ROOT
from toy import TOY, make_group, random_prompts, run_tokens, toy_engine, toy_params

from jaxpaged import LLM, BeamSearchParams, SamplingParams
from jaxpaged.config import CacheConfig, PreemptionConfig
from jaxpaged.device import steps, swap
from jaxpaged.device.attention import REFERENCE
from jaxpaged.device.cache import make_paged_cache
from jaxpaged.device.memory import bytes_in_use, device_memory, usable_memory
from jaxpaged.engine.pool_size import PoolSizer
from jaxpaged.step_io import DecodeBatch, DecodeInputs, SamplingInputs, pack
from pallas_kernels import reference
from pallas_kernels.checks import missing_support

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


@pytest.mark.parametrize("kv_dtype", ["float32", "float8_e4m3fn"])
def test_groups_swap_through_pinned_memory_and_end_with_the_same_tokens(kv_dtype):
    def groups():
        params = [SamplingParams(temperature=0, max_tokens=18), SamplingParams(n=3, top_p=0.9, max_tokens=20)]
        return [make_group(prompt, params[i % 2], str(i), seed=i) for i, prompt in enumerate(random_prompts(12))]

    expected = run_tokens(toy_engine(num_pages=400, max_num_seqs=32, kv_dtype=kv_dtype), groups())
    way = PreemptionConfig("swap", swap_pages=300, transfer_pages=16)
    tight = toy_engine(num_pages=40, preemption=way, kv_dtype=kv_dtype)
    assert swap.host_memory(tight.device).memory_kind == "pinned_host"
    assert run_tokens(tight, groups()) == expected
    assert tight.stats.swaps_out == tight.stats.swaps_in > 0 and tight.stats.recomputed_tokens == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_the_pool_is_updated_in_place(dtype):
    cache = make_paged_cache(TOY, CacheConfig(16, 20_000, dtype))
    pool_bytes = sum(pool.nbytes for pool in (*cache.k, *cache.v))
    zeros = np.zeros(8, np.int32)
    inputs = DecodeInputs(zeros, zeros, zeros, np.zeros((8, 32), np.int32), zeros + 1)
    packed, layout = pack(DecodeBatch(inputs, SamplingInputs(np.zeros((8, 2), np.int32), zeros, zeros)))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), toy_params())
    static = dict(config=TOY, kernels=REFERENCE, layout=layout, layers=(0, TOY.num_layers))
    lowered = steps.decode_layers.lower(params, cache, None, steps.Carried(zeros), packed, **static)
    memory = lowered.compile().memory_analysis()
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
    device = jax.devices()[0]
    assert bytes_in_use(device) <= 0.92 * device_memory(device)[0]
    assert llm.generate([[1, 2, 3]], SamplingParams(temperature=0))[0].finished


def test_pool_weights_and_the_largest_step_fill_their_share_of_the_device():
    device = jax.devices()[0]
    llm = LLM(ROOT / "scripts" / "shapes" / "llama-3.2-1b", load_format="dummy", max_num_seqs=64)
    engine, usable = llm.engine, usable_memory(device, 0.9)
    sizer = PoolSizer(
        engine.model, engine.dtype, engine.cache_config.dtype, engine.cache_config.page_size, engine.limits,
        engine.kernels, device, usable,
    )  # fmt: skip
    taken = bytes_in_use(device) + sizer.measured_step_bytes()
    assert 0.95 < taken / usable <= 1
    prompts = np.random.default_rng(0).integers(0, 1000, (3, 5000)).tolist()  # two full prefill steps
    params = SamplingParams(top_p=0.9, repetition_penalty=1.1, max_tokens=3, ignore_eos=True)
    assert all(output.finished for output in llm.generate(prompts, params))


def needs_the_kernels():
    if missing_support(jax.devices()[0]):
        pytest.skip("the kernels need a Hopper GPU and JAX 0.11")


PROMPTS = ["def add(a, b):\n    return", "import os\n" * 60, "x", "class Tree:\n    def __init__(self, left):\n"]


@pytest.mark.parametrize("kv_cache_dtype, most", [("auto", 0.05), ("fp8", 0.15)])
def test_the_kernels_are_as_close_to_float32_as_the_reference_is(kv_cache_dtype, most):
    """Log-probabilities of a trained model's prompts: what 16 bits lose does not depend on who attends, nor does what 8
    bits of keys and values lose. Rounding to 4 significant bits is sixteen times as coarse as to bfloat16's 8, but of
    keys and values alone: of these log-probabilities the reference loses 0.02 with 16 bits, 0.08 with 8 (root mean
    squares)."""
    needs_the_kernels()
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=0, prompt_logprobs=0, ignore_eos=True)

    def run(dtype, attention, kv_cache_dtype):
        llm = LLM(
            ROOT / "checkpoints" / "tiny-python", dtype=dtype, attention=attention, num_pages=300,
            max_num_batched_tokens=256, kv_cache_dtype=kv_cache_dtype,
        )  # fmt: skip
        assert llm.engine.kernels.name == attention
        return llm.generate(PROMPTS, params)

    def read(outputs):
        """Of all prompts, and of the first token, whose context is the same however the others are chosen."""
        return np.concatenate([values(o.prompt_logprobs) + values(o.outputs[0].logprobs[:1]) for o in outputs])

    exact = read(run("float32", "reference", "auto"))
    lost, theirs = (np.abs(read(run("bfloat16", name, kv_cache_dtype)) - exact) for name in ("pallas", "reference"))
    root_mean_squares = [np.sqrt(np.mean(differences**2)) for differences in (lost, theirs)]
    assert root_mean_squares[0] < 1.3 * root_mean_squares[1], "the kernels lose more than rounding"
    assert root_mean_squares[0] < most
    assert lost.max() < 2 * theirs.max()


def compile_one_shape_of_each_kind(llm):
    """All steps are padded to the largest: few programs are compiled, and a row is computed by the same ones beside
    whatever others."""
    buckets = llm.engine.runner.buckets
    lists = ("decode_rows", "prefill_rows", "prefill_tokens", "table_widths")
    llm.engine.runner.buckets = dataclasses.replace(buckets, **{name: getattr(buckets, name)[-1:] for name in lists})


def test_with_batch_invariance_log_probabilities_do_not_depend_on_the_batch_to_the_bit(tmp_path):
    """A long request beside seven short ones, and beside seven that are long. A model of two layers, with heads and
    widths of Llama 3.2 1B."""
    needs_the_kernels()
    shape = json.loads((ROOT / "scripts" / "shapes" / "llama-3.2-1b" / "config.json").read_text())
    small = dict(shape, num_hidden_layers=2, vocab_size=1024, bos_token_id=0, eos_token_id=1)
    (tmp_path / "config.json").write_text(json.dumps(small))
    llm = LLM(
        tmp_path, load_format="dummy", max_model_len=2304, num_pages=1200, max_num_seqs=8, max_num_batched_tokens=4096,
        mixed_steps=False, prefix_caching=False,  # else a row is computed by other programs beside other rows
    )  # fmt: skip
    rng = np.random.default_rng(0)
    asked = rng.integers(0, 1000, 2048).tolist()
    short, long = (rng.integers(0, 1000, (7, length)).tolist() for length in (10, 2048))
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=5, ignore_eos=True)

    def beside(others):
        sample = llm.generate([asked, *others], params, progress=False)[0].outputs[0]
        assert llm.last_run.preemptions == 0
        return [{token: entry.logprob for token, entry in step.items()} for step in sample.logprobs]

    compile_one_shape_of_each_kind(llm)
    assert beside(short) != beside(long)
    for kv_cache_dtype in ("auto", "fp8"):
        llm.rebuild(batch_invariant=True, kv_cache_dtype=kv_cache_dtype)
        compile_one_shape_of_each_kind(llm)
        assert llm.engine.kernels.is_batch_invariant
        assert beside(short) == beside(long)


def test_fp8_pages_are_copied_swapped_and_prefixed_by_the_kernels_with_the_same_tokens():
    """Samples and beams of a trained model in a pool where they give way, and behind a prefix that is stored once."""
    needs_the_kernels()
    llm = LLM(
        ROOT / "checkpoints" / "tiny-python", dtype="bfloat16", attention="pallas", kv_cache_dtype="fp8",
        batch_invariant=True, max_model_len=256, max_num_seqs=16, max_num_batched_tokens=1024, num_pages=300,
    )  # fmt: skip
    samples = SamplingParams(n=3, seed=5, max_tokens=40, ignore_eos=True)
    params = [samples, BeamSearchParams(beam_width=4, max_tokens=40)] * 2
    prefix, *prompts = (llm.tokenizer.encode(text, True) for text in ("import os\n" * 15, *PROMPTS))
    whole = [prefix + prompt[:30] for prompt in prompts]

    def run(prompts, **options):
        compile_one_shape_of_each_kind(llm)
        outputs = llm.generate(prompts, params, progress=False, **options)
        return [[sample.token_ids for sample in output.outputs] for output in outputs]

    expected = run(whole)
    assert llm.last_run.preemptions == 0 and llm.last_run.page_copies > 0
    assert run([prompt[:30] for prompt in prompts], shared_prefix=prefix) == expected
    llm.rebuild(num_pages=45, preemption="swap")
    assert run(whole) == expected
    assert llm.last_run.swaps_out == llm.last_run.swaps_in > 0


def test_batch_invariance_is_refused_where_attention_is_the_reference():
    with pytest.raises(ValueError, match="batch_invariant=True needs attention='pallas', but .* is 'reference'"):
        LLM(GOLDENS / "llama_tied", batch_invariant=True, attention="reference")


def values(logprobs) -> list[float]:
    """Of the token that is there, at every position that has one."""
    return [next(iter(entry.values())).logprob for entry in logprobs if entry]
