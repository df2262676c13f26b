"""The user's API, as a user calls it: prompts in every form, vLLM's parameters, results in order, clear refusals."""

from __future__ import annotations

import dataclasses
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import all_but_slow
from toy import char_tokenizer, save_toy_checkpoint

from jaxpaged import LLM, BeamSearchParams, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_toy_checkpoint(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture(scope="module")
def llm(directory):
    return LLM(directory, page_size=4, num_pages=100, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=128)


def ids(text):
    return char_tokenizer().encode(text).ids


def test_every_form_of_a_prompt_gives_the_same(llm):
    array = np.array(ids("four score"))
    forms = ["four score", ids("four score"), {"prompt": "four score"}, {"prompt_token_ids": ids("four score")}, array]
    outputs = llm.generate(forms, GREEDY)
    assert len({tuple(out.outputs[0].token_ids) for out in outputs}) == 1
    assert [out.prompt for out in outputs] == ["four score", None, "four score", None, None]
    assert all(out.prompt_token_ids == ids("four score") for out in outputs)
    (alone,) = llm.generate(ids("four score"), GREEDY)
    assert alone.outputs[0].token_ids == outputs[0].outputs[0].token_ids


def test_results_come_in_input_order_and_iterate_as_they_finish(llm):
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (12, 2, 6)]
    prompts = ["one", "two", "three"]
    assert [len(out.outputs[0].token_ids) for out in llm.generate(prompts, params)] == [12, 2, 6]
    assert [out.request_id for out in llm.generate_iter(prompts, params)] == ["1", "2", "0"]
    assert {out.request_id for out in llm.generate_iter(prompts, GREEDY, request_ids=["a", "b", "c"])} == {
        "a",
        "b",
        "c",
    }


def test_requests_that_come_later_are_timed_from_their_arrival(llm):
    outputs = list(llm.generate_iter(["one", "two"], GREEDY, arrival_times=[0.2, 0.0]))
    metrics = {output.request_id: output.metrics for output in outputs}
    assert metrics["0"].arrival_time == 0.2 <= metrics["0"].first_scheduled_time
    assert metrics["1"].arrival_time == 0.0
    with pytest.raises(ValueError, match="1 arrival_times for 2 prompts"):
        llm.generate_iter(["one", "two"], GREEDY, arrival_times=[0.2])


def test_a_rebuilt_engine_keeps_the_weights_and_frees_the_old_pool(directory):
    llm = LLM(directory, page_size=4, num_pages=100, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=128)
    before = [output.outputs[0].token_ids for output in llm.generate(["one", "two"], GREEDY)]
    weights, old_pool = llm.engine.params, weakref.ref(llm.engine.runner.pool.k[0])
    llm.rebuild(kv_cache="contiguous-max", num_pages=80)
    assert llm.engine.params is weights and old_pool() is None
    assert (llm.engine.limits.kv_cache, llm.engine.cache_config.num_pages) == ("contiguous-max", 80)
    assert [output.outputs[0].token_ids for output in llm.generate(["one", "two"], GREEDY)] == before
    with pytest.raises(ValueError, match="dtype cannot change"):
        llm.rebuild(dtype="bfloat16")
    with pytest.raises(ValueError, match="choose one of paged"):
        llm.rebuild(kv_cache="buddy")


def test_no_prompts_no_outputs(llm):
    assert llm.generate([]) == []


def test_text_is_what_the_tokens_say(llm):
    (out,) = llm.generate("hello", SamplingParams(max_tokens=20, seed=3, ignore_eos=True))
    assert out.outputs[0].text == char_tokenizer().decode(out.outputs[0].token_ids)
    (silent,) = llm.generate("hello", SamplingParams(max_tokens=20, seed=3, ignore_eos=True, detokenize=False))
    assert silent.outputs[0].text == "" and silent.outputs[0].token_ids == out.outputs[0].token_ids


def test_stop_strings_cut_the_text_where_they_begin(llm):
    params = dict(max_tokens=30, seed=5, ignore_eos=True)
    (free,) = llm.generate("hello", SamplingParams(**params))
    text = free.outputs[0].text
    stop = text[6:8]
    at = text.index(stop)
    (cut,) = llm.generate("hello", SamplingParams(**params, stop=["never there", stop]))
    assert cut.outputs[0].text == text[:at]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", stop)
    assert cut.outputs[0].token_ids == free.outputs[0].token_ids[: at + 2]
    (kept,) = llm.generate("hello", SamplingParams(**params, stop=stop, include_stop_str_in_output=True))
    assert kept.outputs[0].text == text[: at + 2]
    (late,) = llm.generate("hello", SamplingParams(**params, stop=stop, min_tokens=at + 3))
    assert len(late.outputs[0].token_ids) > at + 2


def test_stop_tokens_and_end_of_sequence(llm):
    (free,) = llm.generate("abc", GREEDY)
    tokens = free.outputs[0].token_ids
    (cut,) = llm.generate("abc", SamplingParams(temperature=0, max_tokens=8, stop_token_ids=[tokens[2]]))
    first = tokens.index(tokens[2])
    assert cut.outputs[0].token_ids == tokens[: first + 1]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", tokens[2])
    assert cut.outputs[0].text == char_tokenizer().decode(tokens[:first])
    end = SamplingParams(temperature=0, max_tokens=8, allowed_token_ids=[1])
    (ended,) = llm.generate("abc", end)
    assert (ended.outputs[0].token_ids, ended.outputs[0].stop_reason) == ([1], None)
    (later,) = llm.generate("abc", SamplingParams(temperature=0, max_tokens=8, allowed_token_ids=[1, 7], min_tokens=3))
    assert later.outputs[0].token_ids[:3] == [7, 7, 7]
    (ignored,) = llm.generate(
        "abc", SamplingParams(temperature=0, max_tokens=8, allowed_token_ids=[1], ignore_eos=True)
    )
    assert ignored.outputs[0].token_ids == [1] * 8 and ignored.outputs[0].finish_reason == "length"


def test_bias_bad_words_and_processors_steer(llm):
    (free,) = llm.generate("abc", GREEDY)
    first, second = free.outputs[0].token_ids[:2]
    (biased,) = llm.generate("abc", SamplingParams(temperature=0, max_tokens=4, logit_bias={9: 100.0}))
    assert biased.outputs[0].token_ids == [9] * 4
    word = char_tokenizer().decode([first, second])
    (without,) = llm.generate("abc", SamplingParams(temperature=0, max_tokens=8, bad_words=[word]))
    assert without.outputs[0].token_ids[0] == first and without.outputs[0].token_ids[1] != second

    def only_even(token_ids, num_tokens, logits):
        return jnp.where(jnp.arange(logits.shape[0]) % 2 == 0, logits, -jnp.inf)

    even = SamplingParams(n=2, max_tokens=8, logits_processors=[only_even], ignore_eos=True)
    outputs = llm.generate(["abc", "abc"], [even, GREEDY])
    assert all(token % 2 == 0 for sample in outputs[0].outputs for token in sample.token_ids)
    assert outputs[1].outputs[0].token_ids == free.outputs[0].token_ids


def test_best_of_returns_the_likeliest(llm):
    params = dict(max_tokens=6, seed=11, ignore_eos=True)
    (everything,) = llm.generate("abc", SamplingParams(n=5, **params))
    (best,) = llm.generate("abc", SamplingParams(n=2, best_of=5, **params))
    ranked = sorted(everything.outputs, key=lambda sample: -sample.cumulative_logprob)
    assert [sample.token_ids for sample in best.outputs] == [sample.token_ids for sample in ranked[:2]]
    assert [sample.index for sample in best.outputs] == [0, 1]


def test_a_request_accounts_for_its_pages(llm):
    (out,) = llm.generate(ids("12345678901"), SamplingParams(n=4, max_tokens=6, seed=1, ignore_eos=True))
    # 11 prompt tokens: two full pages and three slots of a third; 16 positions are written in the end.
    assert (out.kv.pages_at_peak, out.kv.logical_pages_at_peak) == (2 + 4 * 2, 4 * 4)
    assert (out.kv.pages_copied, out.kv.pages_shared) == (3, 9)
    assert llm.last_run.page_copies == 3
    assert max(llm.last_run.pages_used) == 10
    (full_pages,) = llm.generate(ids("123456789012"), SamplingParams(n=4, max_tokens=6, seed=1, ignore_eos=True))
    assert full_pages.kv.pages_copied == 0


def test_a_request_that_gave_way_says_how_often_and_in_which_way(directory, llm):
    prompts = [ids("first come"), ids("first served")]
    params = [SamplingParams(temperature=0, max_tokens=30), SamplingParams(n=3, max_tokens=12, seed=1)]
    params = [dataclasses.replace(one, ignore_eos=True) for one in params]
    tight = dict(page_size=4, num_pages=14, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=128)
    swapping = LLM(directory, preemption="swap", swap_space_gib=0.001, **tight)
    outputs = swapping.generate(prompts, params)
    assert [out.kv.num_swaps for out in outputs] == [out.kv.num_preemptions for out in outputs] == [0, 1]
    run = swapping.last_run
    assert (run.swaps_out, run.swaps_in, run.swap_overflows, run.recomputed_tokens) == (1, 1, 0, 0)
    assert run.swapped_out_bytes == run.swapped_in_bytes > 0 and 0 < run.seconds["swap"] < run.seconds["device"]
    recomputing = LLM(directory, preemption="recompute", **tight).generate(prompts, params)
    assert [(out.kv.num_preemptions, out.kv.num_swaps) for out in recomputing] == [(0, 0), (1, 0)]
    assert recomputing[1].kv.recomputed_tokens > 0
    for one, other, endless in zip(outputs, recomputing, llm.generate(prompts, params), strict=True):
        assert [s.token_ids for s in one.outputs] == [s.token_ids for s in other.outputs]
        assert [s.token_ids for s in one.outputs] == [s.token_ids for s in endless.outputs]


def test_requests_without_a_seed_differ_from_one_another_and_repeat_with_the_llm(directory):
    def fresh():
        return LLM(directory, num_pages=40, max_num_seqs=8, max_num_batched_tokens=64, seed=4)

    params = SamplingParams(max_tokens=8, ignore_eos=True)
    one, two = fresh().generate(["abc", "abc"], params), fresh().generate(["abc", "abc"], params)
    assert one[0].outputs[0].token_ids != one[1].outputs[0].token_ids
    assert [out.outputs[0].token_ids for out in one] == [out.outputs[0].token_ids for out in two]


def test_metrics_are_in_order(llm):
    (out,) = llm.generate("abc", GREEDY)
    times = out.metrics
    assert 0 <= times.arrival_time <= times.first_scheduled_time <= times.first_token_time <= times.finished_time


@pytest.mark.slow
def test_warm_up_leaves_nothing_to_compile(directory):
    llm = LLM(directory, num_pages=50, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=100)
    params = [GREEDY, SamplingParams(n=3, top_p=0.9, max_tokens=12, min_tokens=2)]
    llm.warm_up(params)
    for prompts in (["a", "b" * 50], ["c" * 70, "dd"], ["e", "f"]):
        llm.generate(prompts, params)
        assert llm.last_run.programs_made == 0


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", GREEDY, "the prompt is empty"),
        ([[]], GREEDY, "the prompt has no tokens"),
        ([[1, 97]], GREEDY, "token id 97 is outside the vocabulary, which has ids 0 to 96"),
        ([[-1]], GREEDY, "token id -1 is outside"),
        ({"text": "abc"}, GREEDY, '"prompt_token_ids" or "messages", got'),
        (3.5, GREEDY, "prompts must be text"),
        ("x" * 128, GREEDY, "prompt of 128 tokens leaves no room to generate: max_model_len is 128"),
        ("abc", SamplingParams(n=9), "9 samples of one request exceed max_num_seqs=8"),
        ("abc", SamplingParams(stop_token_ids=[97]), "stop_token_ids has token id 97"),
        ("abc", SamplingParams(logprobs=98), "logprobs=98 exceeds the vocabulary of 97"),
        ("xxxx", SamplingParams(n=8, max_tokens=None), "needs .* pages of 4 tokens, the pool has 99: raise num_pages"),
        (["abc", "def"], [GREEDY], "1 sampling_params for 2 prompts"),
        (["abc", ""], GREEDY, "prompt 1: the prompt is empty"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(llm, prompt, params, message):
    steps = llm.last_run.steps
    with pytest.raises(ValueError, match=message):
        llm.generate(prompt, params)
    assert llm.last_run.steps == steps
    llm.generate("still works", GREEDY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(attention="pallas"), "attention='pallas' cannot run its kernels on"),
        (dict(attention="flash"), "choose one of auto, pallas, reference"),
        (dict(dtype="int8"), "dtype='int8'; choose one of auto, float32"),
        (dict(num_pages=1), "num_pages=1: a pool needs page 0"),
        (dict(num_pages=0), "num_pages must be a positive integer"),
        (dict(num_pages=10**9), "num_pages=1000000000 pages take .* GiB .* at most about"),
        (dict(max_model_len=257), "max_model_len=257 exceeds the 256 positions"),
        (dict(page_size=2.5), "page_size must be a positive integer"),
        (dict(preemption="evict"), "preemption='evict'; choose one of auto, swap, recompute"),
        (dict(preemption="swap", swap_space_gib=0), "needs host memory .* swap_space_gib=0: give it some"),
        (
            dict(preemption="swap", swap_space_gib=1e-6),
            "one page of 4096 bytes, but swap_space_gib=1e-06 holds",
        ),
        (dict(swap_space_gib=-1), "swap_space_gib must be a number of at least 0, got -1"),
        (dict(memory_utilization=1.5), "memory_utilization must be in"),
        (dict(load_format="gguf"), "load_format"),
        (dict(tokenizer=3), "tokenizer must be a path or have encode and decode"),
    ],
)
def test_engine_options_that_cannot_be_are_refused(directory, options, message):
    with pytest.raises(ValueError, match=message):
        LLM(directory, **options)


def test_without_a_tokenizer_ids_work_and_text_says_what_is_missing(tmp_path):
    directory = save_toy_checkpoint(tmp_path / "bare", with_tokenizer=False)
    llm = LLM(directory, num_pages=40, max_num_seqs=8, max_num_batched_tokens=64)
    (out,) = llm.generate([5, 6, 7], GREEDY)
    assert out.outputs[0].text == "" and len(out.outputs[0].token_ids) == 8
    with pytest.raises(ValueError, match="no tokenizer.json or tokenizer.model: give token ids, or name a tokenizer"):
        llm.generate("abc", GREEDY)
    with pytest.raises(ValueError, match="stop strings and bad_words need a tokenizer"):
        llm.generate([5], SamplingParams(stop="x"))
    char_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert LLM(directory, tokenizer=tmp_path, num_pages=40, max_num_seqs=8).tokenizer is not None


def test_a_pool_never_shortens_a_request(directory):
    """What does not fit is refused; capping it would make its tokens depend on the pool."""
    llm = LLM(directory, page_size=4, num_pages=11, max_num_seqs=8, max_num_batched_tokens=64)
    with pytest.raises(ValueError, match="prompt of 2 tokens .* up to 254 tokens needs 64 pages of 4 tokens"):
        llm.generate([5, 6], SamplingParams(temperature=0, max_tokens=None))
    with pytest.raises(ValueError, match="needs 11 pages of 4 tokens, the pool has 10"):
        llm.generate([5, 6], SamplingParams(temperature=0, max_tokens=40))
    (out,) = llm.generate([5, 6], SamplingParams(temperature=0, max_tokens=39, ignore_eos=True))
    assert len(out.outputs[0].token_ids) == 39  # 40 positions are written: 10 pages of 4
    assert max(llm.last_run.pages_used) == 10


def test_check_request_says_what_generate_would(llm):
    llm.check_request("abc", GREEDY)
    with pytest.raises(ValueError, match="^the prompt is empty"):
        llm.check_request("", GREEDY)


def test_cascade_attention_needs_the_pallas_kernels(directory):
    with pytest.raises(ValueError, match="cascade_attention=True needs attention='pallas', but .* is 'reference'"):
        LLM(directory, attention="reference", cascade_attention=True)


@pytest.mark.slow
def test_a_shared_prefix_comes_before_every_prompt(llm):
    prefix, prompts = "four score and seven years", [" ago", " our fathers", "x"]
    params = [GREEDY, SamplingParams(n=3, max_tokens=6, seed=1), BeamSearchParams(beam_width=3, max_tokens=6)]
    whole = llm.generate([ids(prefix + prompt) for prompt in prompts], params)
    forms = [
        (prefix, prompts),
        (ids(prefix), [ids(prompt) for prompt in prompts]),
        (np.array(ids(prefix)), [ids(prompt) for prompt in prompts]),
        ({"prompt_token_ids": ids(prefix)}, prompts),
        (prefix, [{"prompt_token_ids": ids(prompt)} for prompt in prompts]),
    ]
    for given, own in forms:
        llm.reset_prefix_cache()  # else more than the prefix is found
        outputs = llm.generate(own, params, shared_prefix=given)
        assert [out.prompt_token_ids for out in outputs] == [out.prompt_token_ids for out in whole]
        assert [[o.token_ids for o in out.outputs] for out in outputs] == [
            [o.token_ids for o in out.outputs] for out in whole
        ]
        is_text = given is prefix and own is prompts
        assert [out.prompt for out in outputs] == ([prefix + own for own in prompts] if is_text else [None] * 3)
    # 26 tokens: six full pages of the first, which are of the prefix, and a copy of the seventh.
    assert (outputs[0].kv.pages_at_peak, outputs[0].kv.pages_copied) == (10, 1)
    assert max(llm.last_run.pages_used) < sum(out.kv.pages_at_peak for out in outputs)
    (iterated,) = llm.generate_iter(prompts[0], GREEDY, shared_prefix=prefix)
    (searched,) = llm.beam_search(prompts[2], params[2], shared_prefix=prefix)
    assert iterated.outputs[0].text == outputs[0].outputs[0].text
    assert [o.text for o in searched.outputs] == [o.text for o in outputs[2].outputs]


def test_special_tokens_begin_the_prefix_alone(directory):
    class Beginning:
        """Puts <s> before a text."""

        def encode(self, text, add_special_tokens=True):
            return [0] * add_special_tokens + ids(text)

        def decode(self, token_ids, skip_special_tokens=True):
            return char_tokenizer().decode(token_ids, skip_special_tokens)

    llm = LLM(directory, tokenizer=Beginning(), page_size=4, num_pages=60, max_num_seqs=4, max_model_len=64)
    (out,) = llm.generate("cd", GREEDY, shared_prefix="ab")
    assert out.prompt_token_ids == [0, *ids("abcd")]
    (out,) = llm.generate("cd", GREEDY, shared_prefix=ids("ab"))
    assert out.prompt_token_ids == ids("abcd")


@pytest.mark.parametrize("kv_cache", all_but_slow(("contiguous-oracle", "dense", "none"), "none"))
def test_systems_that_share_no_pages_compute_the_prefix_for_each_request(directory, llm, kv_cache):
    other = LLM(directory, page_size=4, num_pages=200, max_num_seqs=8, max_model_len=64, kv_cache=kv_cache)
    prompts, params = ["abc", "defg"], [GREEDY, SamplingParams(n=2, max_tokens=5, seed=3)]
    expected = llm.generate(prompts, params, shared_prefix="a common beginning ")
    outputs = other.generate(prompts, params, shared_prefix="a common beginning ")
    assert [[o.token_ids for o in out.outputs] for out in outputs] == [
        [o.token_ids for o in out.outputs] for out in expected
    ]


@pytest.mark.parametrize(
    ("prefix", "params", "message"),
    [
        ("", GREEDY, "^shared_prefix: the prompt is empty"),
        ([], GREEDY, "^shared_prefix: the prompt has no tokens"),
        ([97], GREEDY, "^shared_prefix: token id 97 is outside the vocabulary"),
        (["a", "b"], GREEDY, "^shared_prefix: a prompt must be text, a list of token ids or a dict"),
        ("x" * 125, GREEDY, r"prompt of 128 tokens \(125 of them the shared prefix\) leaves no room to generate"),
        ("x" * 39, SamplingParams(n=8, max_tokens=80), r"of 42 tokens \(39 of them the shared prefix\) .* pool has 99"),
        ("abc", SamplingParams(prompt_logprobs=1), "prompt_logprobs needs the whole prompt computed .* leave out one"),
    ],
)
def test_a_prefix_that_cannot_be_shared_is_refused_before_anything_runs(llm, prefix, params, message):
    steps = llm.last_run.steps
    with pytest.raises(ValueError, match=message):
        llm.generate("abc", params, shared_prefix=prefix)
    with pytest.raises(ValueError, match=message):
        llm.check_request("abc", params, shared_prefix=prefix)
    assert llm.last_run.steps == steps
    llm.generate("abc", GREEDY, shared_prefix="still works ")


def test_nothing_is_computed_for_no_prompts(llm):
    assert llm.generate([], GREEDY, shared_prefix="abc") == [] and llm.last_run.steps == 0
