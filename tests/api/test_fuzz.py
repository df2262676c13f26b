"""Whatever is given as parameters, prompts or options is accepted as a plain value or refused with ValueError."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
from hostile import BEAM_FIELDS, SAMPLING_FIELDS, anything, cases, edge_ints, fields, flags, prompts, run_cases
from hypothesis import strategies as st
from toy import TOY, save_toy_checkpoint

from jaxpaged import LLM, BeamSearchParams, SamplingParams
from jaxpaged.api.constraint import Constraint
from jaxpaged.config import EngineOptions
from jaxpaged.requests.prompts import is_one_prompt, read_prompts

OPTIONS = {
    "dtype": st.sampled_from(["auto", "float32", "float64"]), "load_format": st.sampled_from(["auto", "dummy", "x"]),
    "seed": edge_ints, "max_model_len": st.none() | edge_ints, "page_size": st.integers(-1, 64) | edge_ints,
    "num_pages": st.none() | edge_ints, "memory_utilization": st.floats(0, 1), "max_num_seqs": edge_ints,
    "max_num_batched_tokens": edge_ints, "attention": st.sampled_from(["auto", "reference", "x"]),
    "kv_cache_dtype": st.sampled_from(["auto", "fp8", "fp8_e4m3", "fp8_e5m2"]), "cascade_attention": flags,
    "batch_invariant": flags,
    "preemption": st.sampled_from(["auto", "swap", "recompute"]),
    "swap_space_gib": st.floats(), "kv_cache": st.sampled_from(["paged", "none", "dense"]),
    "watermark": st.floats(0, 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = save_toy_checkpoint(tmp_path_factory.mktemp("toy"))
    return LLM(directory, page_size=4, num_pages=64, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64)


def made(kind, given):
    """The object, or None where it was refused."""
    try:
        return kind(**given)
    except ValueError as error:
        assert str(error) and "4300 digits" not in str(error)
        return None


def is_plain(value) -> bool:
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(type(key) is int and is_plain(one) for key, one in value.items())
    if isinstance(value, Constraint):
        return all(map(is_plain, vars(value).values()))
    return value is None or type(value) in (bool, int, float) or isinstance(value, str) or callable(value)


@cases(quick=300)
@pytest.mark.parametrize("kind", [SamplingParams, BeamSearchParams])
def test_parameters_are_plain_values_or_refused(kind, num_cases):
    def check(given):
        params = made(kind, given)
        if params is None:
            return
        values = {f.name: getattr(params, f.name) for f in dataclasses.fields(params)}
        assert all(map(is_plain, values.values())), values
        assert all(np.isfinite(np.float32(v)) for v in values.values() if isinstance(v, float)), values
        assert kind(**values) == params  # what was read is read again
        in_file = {n: v for n, v in values.items() if n != "logits_processors"}
        json.dumps(in_file, allow_nan=False, default=lambda constraint: constraint.as_json()).encode()
        try:
            params.check_token_ids(TOY.vocab_size)
        except ValueError:
            pass

    required = () if kind is SamplingParams else ("beam_width",)
    run_cases(num_cases, check, fields(SAMPLING_FIELDS if kind is SamplingParams else BEAM_FIELDS, required))


@cases(quick=200)
def test_engine_options_are_plain_values_or_refused(num_cases):
    def check(given):
        options = made(EngineOptions, given)
        if options is not None:
            assert all(type(v) in (str, int, float, bool, type(None)) for v in dataclasses.astuple(options))

    run_cases(num_cases, check, fields(OPTIONS))


@cases(quick=300)
def test_prompts_are_read_or_refused(num_cases):
    def check(given):
        try:
            is_one_prompt(given)
            read = read_prompts(given)
        except ValueError as error:
            assert len(str(error)) < 400
            return
        for text, ids, _, conversation in read:
            assert [text, ids, conversation].count(None) == 2
            assert (text is None or text.encode()) and (ids is None or {type(i) for i in ids} == {int})

    run_cases(num_cases, check, prompts | st.lists(prompts, max_size=3))


@cases(quick=300)
def test_a_request_is_accepted_or_refused_before_anything_is_built(llm, num_cases):
    def check(prompt, sampling, beams, is_search, prefix):
        params = made(BeamSearchParams, beams) if is_search else made(SamplingParams, sampling)
        if params is not None:
            accepts(llm, prompt, params, prefix)

    run_cases(
        num_cases, check, prompts, fields(SAMPLING_FIELDS), fields(BEAM_FIELDS, ("beam_width",)), flags,
        st.one_of(st.none(), st.none(), st.just("ab"), prompts),
    )  # fmt: skip


def accepts(llm, prompt, params, prefix=None) -> bool:
    try:
        llm.check_request(prompt, params, prefix)
    except ValueError as error:
        assert str(error) and len(str(error)) < 1000
        return False
    return True


@cases(quick=100, slow=1000)
def test_the_other_arguments_of_calls_are_read_or_refused(llm, num_cases):
    params = st.sampled_from([SamplingParams(max_tokens=1), BeamSearchParams(beam_width=2, max_tokens=1)]) | anything

    def check(params, ids, times, odd):
        calls = (
            lambda: llm.generate_iter(["a", "b"], params, ids, times),  # checked when called, runs when iterated
            lambda: llm.watch_beams(odd, params),
            lambda: llm.beam_search([], params),
            lambda: llm.check_request("a", params, odd),
        )
        for call in calls:
            try:
                call()
            except ValueError as error:
                assert str(error)

    run_cases(num_cases, check, params, st.none() | anything, st.none() | anything, anything)


#: Asks for everything at once, so that all runs of this test take the same few programs.
EVERYTHING = SamplingParams(
    temperature=1.0, top_p=0.9, repetition_penalty=1.1, logit_bias={i: 0.5 for i in range(16)}, seed=1, max_tokens=2,
    allowed_token_ids=list(range(64)), logprobs=2, n=2,
)  # fmt: skip
RUNNABLE = {
    name: SAMPLING_FIELDS[name]
    for name in ("temperature", "top_p", "top_k", "min_p", "seed", "min_tokens", "stop_token_ids", "ignore_eos", "n",
                 "repetition_penalty", "presence_penalty", "frequency_penalty", "allowed_token_ids", "logit_bias")
}  # fmt: skip


def run_beside_everything(llm, prompt, params):
    return llm.generate([prompt] * (len(params) + 1), [EVERYTHING, *params], progress=False)[1:]


@cases(quick=10, slow=150)
def test_what_is_accepted_runs_and_gives_legal_tokens(llm, num_cases):
    def check(drawn):
        asked = [made(SamplingParams, {**one, "max_tokens": 3, "logprobs": 2}) for one in drawn]
        asked = [p for p in asked if p is not None and len(p.logit_bias or ()) < 8 and accepts(llm, [5, 6], p)]
        for params, output in zip(asked, run_beside_everything(llm, [5, 6], asked), strict=True):
            for sample in output.outputs:
                if sample.finish_reason != "error":
                    check_legal(params, sample)

    run_cases(num_cases, check, st.lists(fields(RUNNABLE), min_size=8, max_size=8))


def check_legal(params, sample) -> None:
    assert 1 <= len(sample.token_ids) <= 3 and all(0 <= t < TOY.vocab_size for t in sample.token_ids)
    assert np.isfinite(sample.cumulative_logprob)
    if params.allowed_token_ids is not None:
        assert set(sample.token_ids) <= set(params.allowed_token_ids)
    ends = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else (1,))}
    assert not ends & set(sample.token_ids[: params.min_tokens])


def test_the_narrowest_distributions_are_the_likeliest_token(llm):
    narrow = [dict(top_p=1e-38), dict(top_p=5e-324), dict(min_p=1.0), dict(temperature=1e-30), dict(top_k=1)]
    params = [SamplingParams(max_tokens=2, seed=3, **one) for one in (dict(temperature=0.0), *narrow)]
    for first in (5, 6):
        outputs = run_beside_everything(llm, [first], params)
        assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
        assert any(outputs[0].outputs[0].token_ids)


def test_seeds_of_64_bits_differ_and_others_are_refused(llm):
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1]
    params = [SamplingParams(seed=seed, max_tokens=12, ignore_eos=True, temperature=5.0) for seed in seeds]
    outputs = run_beside_everything(llm, [5], params)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == len(seeds)
    for seed in (-1, 2**64, 10**5000):
        for kind in (
            lambda s: SamplingParams(seed=s),
            lambda s: BeamSearchParams(beam_width=2, seed=s),
            lambda s: EngineOptions(seed=s),
        ):
            with pytest.raises(ValueError, match=r"seed must be at least 0 and below 2\*\*64"):
                kind(seed)


def test_what_a_caller_changes_later_changes_no_accepted_parameters():
    given = dict(stop=["x"], stop_token_ids=[3], allowed_token_ids=[3, 4], bad_words=["y"], logit_bias={5: 1.0},
                 logits_processors=[abs])  # fmt: skip
    kept = copy.deepcopy(given)
    params = SamplingParams(**given)
    for value in given.values():
        value.clear()
    assert {name: getattr(params, name) for name in kept} == kept


@pytest.mark.parametrize(
    "given, named",
    [
        (dict(logits_processors=(f for f in [abs])), "logits_processors must be a list of callables"),
        (dict(logits_processors=abs), "logits_processors must be a list of callables"),
        (dict(stop_token_ids={3}), "stop_token_ids must be a list of token ids, got .*: make a list of it"),
        (dict(allowed_token_ids=b"abc"), "allowed_token_ids must be a list of token ids"),
        (dict(stop_token_ids=[True]), "stop_token_ids must be a list of token ids, but has True"),
        (dict(stop_token_ids=np.array([[1]])), r"but has \[1\]"),
        (dict(stop=["a", "\ud83d"]), "stop has a character that is not Unicode text"),
        (dict(bad_words=["\ud83d"]), "bad_words has a character that is not Unicode text"),
        (dict(bad_words=["a"] * 1_000_000), "bad_words has 1000000 strings"),
        (dict(temperature=10**400), "temperature must be .* finite"),
        (dict(repetition_penalty=1e38), "repetition_penalty must be in"),
        (dict(logit_bias={5: float("inf")}), r"logit_bias\[5\] must be finite"),
        (dict(logit_bias={5: float("nan")}), r"logit_bias\[5\] must be a number"),
        (dict(max_tokens=10**5000), "max_tokens must be at most"),
    ],
)
def test_what_is_refused_is_named(given, named):
    with pytest.raises(ValueError, match=named):
        SamplingParams(**given)


def test_numbers_of_numpy_are_numbers():
    params = SamplingParams(
        n=np.int64(2), temperature=np.float32(0.5), stop_token_ids=np.array([3, 4]), seed=np.uint64(2**63)
    )
    assert (params.n, params.temperature, params.stop_token_ids, params.seed) == (2, 0.5, [3, 4], 2**63)


NO_PROMPTS = (
    b"abc", bytearray(b"abc"), memoryview(b"abc"), [b"abc"], {"prompt_token_ids": b"abc"}, np.array([1.0]), np.array(3),
    [[[1]]], [[True]], "a\ud83d", (i for i in (1, 2)),
)  # fmt: skip


@pytest.mark.parametrize("given", NO_PROMPTS)
def test_what_is_no_prompt_is_refused(given):
    with pytest.raises(ValueError):
        read_prompts(given)


def test_sizes_are_checked_before_anything_is_built(llm):
    for params in (
        BeamSearchParams(beam_width=2**31),
        BeamSearchParams(beam_width=10**12, num_beam_groups=10**12, diversity_penalty=1.0),
        SamplingParams(n=10**12), SamplingParams(best_of=10**12), SamplingParams(logprobs=10**9),
    ):  # fmt: skip
        assert not accepts(llm, "abc", params)
    assert not accepts(llm, "a" * 10_000_000, SamplingParams())
    assert not accepts(llm, [5], SamplingParams(bad_words=["a" * 10_000_000]))
    assert accepts(llm, "abc", SamplingParams(max_tokens=10**15, top_k=10**15))
