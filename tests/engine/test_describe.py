"""What `jaxpaged info` promises: the pool that an LLM with the same options gets, whatever these are."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from paths import GOLDENS, ROOT
from toy import save_toy_checkpoint

from jaxpaged import LLM
from jaxpaged.config import DENSE_CACHES, num_dense_rows
from jaxpaged.config.choices import KV_CACHE_DTYPES, KV_CACHES, PREEMPTION_MODES
from jaxpaged.engine.describe import describe_checkpoint

TINY = ROOT / "checkpoints" / "tiny-python"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return save_toy_checkpoint(tmp_path_factory.mktemp("described") / "toy")


@pytest.fixture(scope="module")
def llm(toy):
    return LLM(toy)


def facts_of(text: str) -> dict[str, str]:
    return {line.split(":")[0]: line.split(":", 1)[1].strip() for line in text.splitlines()}


def promised(facts: dict[str, str]) -> tuple[int, int]:
    """Pages, and tokens that fit; 0 pages where there is said to be no pool."""
    pages = re.match(r"([\d,]+) pages", facts["pool"])
    number = facts["tokens that fit"].replace(",", "")
    return int(pages[1].replace(",", "")) if pages else 0, int(number)


def held(llm: LLM) -> tuple[int, int]:
    cache, limits = llm.engine.cache_config, llm.engine.limits
    if limits.kv_cache == "none":
        return 0, 0
    if limits.kv_cache in DENSE_CACHES:
        return cache.num_pages, num_dense_rows(cache, limits.max_model_len) * limits.max_model_len
    return cache.num_pages, cache.num_usable_tokens


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "max_model_len": st.integers(1, 256),
        "page_size": st.integers(1, 64),
        "num_pages": st.one_of(st.none(), st.integers(1, 300)),
        "max_num_seqs": st.integers(1, 300),
        "max_num_batched_tokens": st.integers(1, 9000),
        "kv_cache": st.sampled_from(KV_CACHES),
        "kv_cache_dtype": st.sampled_from(KV_CACHE_DTYPES),
        "preemption": st.sampled_from(PREEMPTION_MODES),
        "swap_space_gib": st.sampled_from((0.0, 0.001, 4.0)),
        "memory_utilization": st.sampled_from((0.3, 0.9)),
        "mixed_steps": st.booleans(),
        "prefix_caching": st.booleans(),
    },
)


@example(options={})
@given(options=OPTIONS)
@settings(max_examples=20, deadline=None)
def test_info_promises_the_pool_that_an_llm_with_these_options_gets(toy, llm, options):
    check_promise(toy, llm, options)


@pytest.mark.slow
@example(options={"max_num_seqs": 4, "max_num_batched_tokens": 32, "memory_utilization": 5e-5})
@given(options=OPTIONS)
@settings(max_examples=60, deadline=None)
def test_so_it_does_for_many_options_and_where_memory_is_what_there_is_too_little_of(toy, llm, options):
    check_promise(toy, llm, options)


def check_promise(toy, llm, options):
    try:
        llm.rebuild(**{"num_pages": None, "max_model_len": None, **DEFAULTS, **options})
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            raise ValueError(facts_of(LLM.describe(toy, **options))["pool"]) from None  # or it is refused, too
    else:
        assert promised(facts_of(LLM.describe(toy, **options))) == held(llm)


#: Of the options above, since `rebuild` changes what it is given alone.
DEFAULTS = {
    "page_size": 16, "max_num_seqs": 256, "max_num_batched_tokens": 8192, "kv_cache": "paged", "kv_cache_dtype": "auto",
    "preemption": "auto", "swap_space_gib": 4.0, "memory_utilization": 0.9, "mixed_steps": True, "prefix_caching": True,
}  # fmt: skip


def test_a_log_says_how_large_the_pool_is_and_why(llm, caplog):
    with caplog.at_level(logging.INFO, logger="jaxpaged"):
        llm.rebuild(**DEFAULTS, num_pages=None, max_model_len=100)
        llm.rebuild(num_pages=20)
    lines = [message for message in caplog.messages if message.startswith("pool: ")]
    assert lines == [
        "pool: 1,793 pages of 16 tokens, so 28,672 tokens (0.01 GiB): all that 256 sequences of 100 tokens can fill",
        "pool: 20 pages of 16 tokens, so 304 tokens (0.00 GiB): as num_pages says",
    ]


@pytest.mark.slow
def test_the_default_pool_of_the_bundled_model_is_the_one_that_is_promised(caplog):
    with caplog.at_level(logging.INFO, logger="jaxpaged"):
        llm = LLM(TINY, dtype="bfloat16", load_format="dummy")
    facts = facts_of(LLM.describe(TINY, dtype="bfloat16"))
    assert promised(facts) == held(llm) == (16385, 262144)
    why = "all that 256 sequences of 1,024 tokens can fill"
    assert facts["pool"] == f"16,385 pages of 16 tokens, 768.0 MiB: {why}"
    assert f"pool: 16,385 pages of 16 tokens, so 262,144 tokens (0.75 GiB): {why}" in caplog.text


def test_info_counts_from_the_configuration_alone(tmp_path):
    values = json.loads((GOLDENS / "llama_tied" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values))
    facts = facts_of(LLM.describe(tmp_path, dtype="bfloat16"))
    assert facts["format"] == "huggingface"
    assert facts["parameters"] == "19,616"
    assert facts["weights"] == "38.3 KiB as bfloat16"
    assert facts["KV per token"] == "128 bytes as bfloat16"
    assert facts["tokenizer"] == "none: prompts must be token ids"
    assert "64 bytes as float8_e4m3fn" in LLM.describe(tmp_path, kv_cache_dtype="fp8")


def test_info_names_windows_and_tokenizer(tmp_path):
    directory = Path(shutil.copytree(GOLDENS / "gemma3", tmp_path / "gemma3"))
    (directory / "tokenizer.model").touch()
    text = describe_checkpoint(directory)
    assert "a window of 6 tokens in 2 of 3 layers, else full" in text
    assert "tokenizer.model" in text


def test_a_model_that_is_too_large_is_described_with_the_reason():
    facts = facts_of(LLM.describe(ROOT / "scripts" / "shapes" / "opt-13b", memory_utilization=1e-4))
    assert facts["parameters"] == "12,853,473,280"
    assert facts["pool"].startswith("none: the weights take 47.88 GiB and") and facts["tokens that fit"] == "0"


@pytest.mark.parametrize(
    "options, words",
    [({"max_model_len": 2000}, "exceeds the 256 positions"), ({"attention": "pallas"}, "pallas"),
     ({"kv_cache": "dense", "kv_cache_dtype": "fp8"}, "has none")],
)  # fmt: skip
def test_options_with_which_there_is_no_engine_are_refused(toy, options, words):
    with pytest.raises(ValueError, match=words):
        LLM.describe(toy, **options)
