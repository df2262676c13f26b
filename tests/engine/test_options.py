"""The options of an engine stand once, and what shows them to people says what is there."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
from option_table import GUIDE, option_table, table_in
from toy import save_toy_checkpoint

from jaxpaged import LLM
from jaxpaged.config import EngineConfig, EngineOptions
from jaxpaged.config.options import FIXED_OPTIONS, OPTION_NAMES, RESULT_OPTIONS, engine_options


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = save_toy_checkpoint(tmp_path_factory.mktemp("toy"))
    return LLM(directory, page_size=4, num_pages=20, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=32)


def test_the_table_of_the_guide_is_what_the_options_say():
    assert table_in(GUIDE.read_text(encoding="utf-8")) == option_table()


def test_help_lists_every_option_with_its_default_and_its_choices():
    shown, text = inspect.signature(LLM).parameters, " ".join((inspect.getdoc(LLM.__init__) or "").split())
    assert list(shown) == ["model", "tokenizer", "revision", "download", "mesh", *OPTION_NAMES]
    for option in engine_options():
        assert shown[option.name].default == option.default
        assert f"{option.name}: {option.help_text}" in text
    assert "preemption: how a request gives way" in text and "one of auto, swap, recompute (default auto)" in text
    assert "num_pages: pages of the pool, page 0 included, which is never used (default: what fits the device)" in text


def test_an_option_that_is_not_given_has_its_default():
    options = dataclasses.asdict(EngineOptions())
    assert options == {option.name: option.default for option in engine_options()}
    limits = EngineConfig(max_model_len=64)
    same = ("max_num_seqs", "max_num_batched_tokens", "watermark", "kv_cache")
    assert {name: getattr(limits, name) for name in same} == {name: options[name] for name in same}
    with pytest.raises(TypeError, match="positional"):
        EngineOptions("float32")  # pyright: ignore[reportCallIssue]


def test_which_options_an_llm_settles_and_which_decide_results():
    assert FIXED_OPTIONS == ("dtype", "load_format", "seed", "tensor_parallel_size", "data_parallel_size")
    assert RESULT_OPTIONS == ("dtype", "load_format", "seed", "max_model_len", "kv_cache_dtype")


@pytest.mark.parametrize("option", [o for o in engine_options() if o.choices], ids=lambda option: option.name)
def test_an_option_takes_each_of_its_choices_and_nothing_else(option):
    def taken(choice: Any) -> str:
        return getattr(EngineOptions(**{option.name: choice}), option.name)

    assert [taken(choice) for choice in option.choices] == list(option.choices)
    for other in ("x", None, ["auto"]):
        with pytest.raises(ValueError, match=f"^{option.name}=.*; choose one of {', '.join(option.choices)}$"):
            taken(other)


UNKNOWN = [
    (dict(page_siz=16), "LLM takes no argument 'page_siz' (did you mean page_size?)"),
    (dict(gpu_memory_utilization=0.8), "'gpu_memory_utilization' (here it is memory_utilization)"),
    (dict(block_size=16), "'block_size' (here it is page_size)"),
    (dict(num_gpu_blocks_override=9), "'num_gpu_blocks_override' (here it is num_pages)"),
    (dict(max_seq_len=64), "'max_seq_len' (here it is max_model_len)"),
    (dict(swap_space=4), "'swap_space' (here it is swap_space_gib)"),
    (dict(shared_prefixes=True), "'shared_prefixes' (it is called cascade_attention now)"),
    (dict(disable_cascade_attn=True), "'disable_cascade_attn' (here cascade_attention=True enables it)"),
    (dict(pipeline_parallel_size=2), "(a model is divided among devices by heads alone, which is tensor_parallel_size"),
    (dict(enable_prefix_caching=True), "'enable_prefix_caching' (here it is prefix_caching)"),
    (dict(block_size=16, watermrk=0), "'block_size' (here it is page_size), 'watermrk' (did you mean watermark?)"),
    (dict(foo=1), "'foo' (there is none like it); it takes model, tokenizer, dtype, load_format, seed,"),
]  # fmt: skip


@pytest.mark.parametrize("options, message", UNKNOWN, ids=lambda value: "-".join(value) if type(value) is dict else "")
def test_an_unknown_option_is_answered_with_what_was_meant(options, message):
    with pytest.raises(TypeError) as caught:
        LLM("there is no such model", **options)
    assert message in str(caught.value)


def test_an_unknown_option_of_a_rebuild_is_answered_and_costs_nothing(llm):
    engine = llm.engine
    for options, message in ((dict(num_page=3), r"rebuild takes no argument 'num_page' \(did you mean num_pages\?\)"),
                             (dict(block_size=4), r"'block_size' \(here it is page_size\)"),
                             (dict(foo=1), "'foo' .*; it takes max_model_len, page_size, num_pages")):  # fmt: skip
        with pytest.raises(TypeError, match=message):
            llm.rebuild(**options)
    for name in ("model", "tokenizer", *FIXED_OPTIONS):
        with pytest.raises(ValueError, match=f"{name} cannot change without another LLM"):
            llm.rebuild(**{name: None})
    assert llm.engine is engine


@pytest.mark.parametrize("call", ["generate", "generate_iter", "beam_search", "watch_beams"])
def test_an_unknown_argument_of_a_call_is_answered_with_what_was_meant(llm, call):
    asked = dict(use_tqdm=False, temperature=0.5, length_penalty=1.0, watermark=0.5, add_special_token=False)
    with pytest.raises(TypeError) as caught:
        getattr(llm, call)("a", None, **asked)
    assert str(caught.value) == (
        f"{call} takes no argument 'use_tqdm' (here it is progress), "
        "'temperature' (it goes into SamplingParams(temperature=...)), "
        "'length_penalty' (it goes into BeamSearchParams(length_penalty=...)), "
        "'watermark' (it is an option of the engine: LLM(model, watermark=...)), "
        "'add_special_token' (did you mean add_special_tokens?)"
    )


def test_the_signatures_of_calls_are_their_own():
    assert list(inspect.signature(LLM.generate).parameters) == [
        "self", "prompts", "sampling_params", "progress", "shared_prefix", "add_special_tokens", "on_token",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(kv_cache="dense"), "kv_cache_dtype='fp8' is of pages, and kv_cache='dense' has none: leave"),
        (dict(kv_cache="none"), "kv_cache_dtype='fp8' is of pages, and kv_cache='none' has none"),
        (dict(cascade_attention=True), "cascade_attention=True reads pages of dtype alone, and .*'fp8' are not"),
        (dict(attention="pallas"), "attention='pallas' cannot run its kernels"),
        (dict(kv_cache_dtype="fp8_e5m2"), "kv_cache_dtype='fp8_e5m2'; choose one of auto, fp8, fp8_e4m3"),
    ],
)
def test_fp8_pages_are_refused_where_nothing_can_read_them(llm, options, message):
    directory = llm._checkpoint.directory
    with pytest.raises(ValueError, match=message):
        LLM(directory, **{"kv_cache_dtype": "fp8", "num_pages": 20, **options})


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(attention="reference"), "batch_invariant=True needs attention='pallas', but .* is 'reference' on"),
        (dict(kv_cache="dense"), "batch_invariant=True needs attention='pallas', but .* is 'dense-"),
        (dict(kv_cache="none"), "batch_invariant=True needs attention='pallas', but .* is 'dense-"),
        (
            dict(cascade_attention=True),
            "cascade_attention=True reads pages in an order that follows from the whole batch",
        ),
        (dict(batch_invariant=1), "batch_invariant must be True or False, got 1"),
    ],
)
def test_batch_invariance_is_refused_where_there_is_none(llm, options, message):
    directory = llm._checkpoint.directory
    with pytest.raises(ValueError, match=message):
        LLM(directory, **{"batch_invariant": True, "num_pages": 20, **options})
