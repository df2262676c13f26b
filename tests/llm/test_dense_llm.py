"""Dense systems through `LLM`: what their pool takes, and which options they refuse."""

from __future__ import annotations

import jax
import pytest
from toy import TOY, save_toy_checkpoint

from jaxpaged import LLM, SamplingParams
from jaxpaged.config import DENSE_CACHES, KV_CACHES, CacheConfig, EngineConfig
from jaxpaged.device.dense_cache import make_cache

#: Greedy tokens by recomputation without jaxpaged's engine (helpers.greedy_tokens).
EXPECTED = [[15, 1, 75, 63, 34, 66], [31, 31, 51, 31, 9, 11]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_toy_checkpoint(tmp_path_factory.mktemp("toy"))


def pool_bytes(kv_cache, max_model_len=100, num_pages=98) -> int:
    limits = EngineConfig(max_model_len, kv_cache=kv_cache)
    pool = jax.eval_shape(lambda: make_cache(TOY, CacheConfig(16, num_pages, "float32"), limits))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pool))


@pytest.mark.parametrize("kv_cache", DENSE_CACHES)
def test_a_dense_pool_takes_the_bytes_of_the_pages_less_what_is_no_whole_row(kv_cache):
    page = 16 * TOY.kv_bytes_per_token(4)
    assert pool_bytes("paged") == 98 * page
    assert pool_bytes(kv_cache) == 13 * 7 * page  # 97 usable pages are 13 rows of 7 pages, and 6 pages
    assert pool_bytes("none") == 0


@pytest.mark.parametrize("kv_cache", KV_CACHES)
def test_every_system_serves_an_llm(checkpoint, kv_cache):
    llm = LLM(checkpoint, max_model_len=64, max_num_seqs=4, kv_cache=kv_cache, max_num_batched_tokens=256)
    outputs = llm.generate(["a b", "what is a page"], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    assert [output.outputs[0].token_ids for output in outputs] == EXPECTED


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (dict(kv_cache="dense", attention="pallas"), "attention='pallas' reads pages"),
        (dict(kv_cache="none", attention="pallas"), "attention='pallas' reads pages"),
        (dict(kv_cache="dense", cascade_attention=True), "shares nothing: cascade_attention=True needs"),
        (dict(kv_cache="none", preemption="swap"), "preemption='swap' needs kv_cache='paged'"),
        (
            dict(kv_cache="dense-static", num_pages=5, max_model_len=128),
            "keeps max_model_len=128 tokens for each sequence, 8 pages of 16, and the pool has 4: raise num_pages",
        ),
        (dict(kv_cache="slabs"), "kv_cache='slabs'; choose one of paged, .*dense-static-global, none"),
    ],
)
def test_what_a_system_cannot_do_is_refused(checkpoint, options, why):
    with pytest.raises(ValueError, match=why):
        LLM(checkpoint, **options)


def test_a_prompt_log_probability_is_filed_once_though_every_step_computes_it(checkpoint):
    llm = LLM(checkpoint, max_model_len=64, max_num_seqs=4, kv_cache="none", max_num_batched_tokens=256)
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=1)
    (output,) = llm.generate("abc", params)
    expected = LLM(checkpoint, max_model_len=64).generate("abc", params)[0]
    assert [set(entry or {}) for entry in output.prompt_logprobs] == [
        set(entry or {}) for entry in expected.prompt_logprobs
    ]
