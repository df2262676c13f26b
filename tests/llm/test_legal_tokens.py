"""No token that a request forbids is ever chosen: it is refused, ends with an error, or has legal tokens alone."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import greedy_tokens
from toy import TOY, char_tokenizer, save_toy_checkpoint, toy_params

from jaxpaged import LLM, BeamSearchParams, SamplingParams

EOS = 1  # of the checkpoint
LETTERS = "abcd"
IDS = [ord(letter) - 30 for letter in LETTERS]
A, B, C, D = IDS


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = save_toy_checkpoint(tmp_path_factory.mktemp("model") / "toy")
    llm = LLM(directory, page_size=4, num_pages=900, max_num_seqs=128, max_num_batched_tokens=128, max_model_len=32)
    # One shape of each kind of step, so that few programs are compiled.
    llm.engine.runner.buckets = dataclasses.replace(
        llm.engine.runner.buckets, decode_rows=(128,), prefill_tokens=(128,)
    )
    return llm


def dead_end(token_ids, num_tokens, logits):
    """Nothing may follow a D."""
    return jnp.where(token_ids[num_tokens - 1] == D, -jnp.inf, logits)


def rising(token_ids, num_tokens, logits):
    """Only tokens above the last one."""
    return jnp.where(jnp.arange(len(logits)) > token_ids[num_tokens - 1], logits, -jnp.inf)


RULES = {dead_end: lambda last, token: last != D, rising: lambda last, token: token > last}


@functools.cache
def word_ids(text: str) -> list[int]:
    return char_tokenizer().encode(text).ids


def is_legal(params, prompt: list[int], output: list[int], token: int) -> bool:
    """Whether `token` may follow, as the guide has it."""
    ends = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else (EOS,))}
    if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
        return False
    if len(output) < params.min_tokens and token in ends:
        return False
    for word in params.bad_words or ():
        for text in (word, " " + word):
            *before, last = word_ids(text)
            if token == last and output[len(output) - len(before) :] == before:
                return False
    last = (prompt + output)[-1]
    return all(RULES[processor](last, token) for processor in params.logits_processors or ())


def random_case(rng: np.random.Generator) -> tuple[list[int], SamplingParams | BeamSearchParams]:
    """A prompt of one letter, and parameters of which many combinations leave little or nothing."""

    def some(values, most):
        return [values[i] for i in rng.permutation(len(values))[: rng.integers(1, most + 1)]]

    maximum = int(rng.integers(1, 6))
    options = {
        "max_tokens": maximum,
        "min_tokens": int(rng.choice([0, 0, maximum, rng.integers(0, maximum + 1)])),
        "ignore_eos": bool(rng.random() < 0.2),
        "allowed_token_ids": some([*IDS, EOS], 3) if rng.random() < 0.9 else None,
        "stop_token_ids": some(IDS, 2) if rng.random() < 0.4 else None,
        "bad_words": some(["a", "b", "c", "ab", "ba", "cc", "dd", "abc"], 3) if rng.random() < 0.5 else None,
        "logit_bias": {int(rng.choice(IDS)): float(rng.choice([-100, -50, 100]))} if rng.random() < 0.3 else None,
        "repetition_penalty": float(rng.choice([1.0, 1.3])),
        "logits_processors": [rng.choice(list(RULES))] if rng.random() < 0.4 else None,
        "logprobs": 0,
    }
    prompt, kind = [int(rng.choice(IDS))], rng.random()
    if kind < 0.3:
        return prompt, SamplingParams(temperature=0, **options)
    if kind < 0.6:
        extra = {"top_p": 0.7, "top_k": 3} if rng.random() < 0.5 else {}
        return prompt, SamplingParams(n=int(rng.integers(1, 4)), seed=int(rng.integers(99)), **options, **extra)
    sampled = {"do_sample": True, "seed": 5} if rng.random() < 0.3 else {}
    return prompt, BeamSearchParams(
        beam_width=4, early_stopping="never" if rng.random() < 0.5 else True, **options, **sampled
    )


def first_tokens(prompt, params) -> list[int]:
    """Possible first tokens, logits processors left aside."""
    without = SamplingParams(**{n: getattr(params, n) for n in
                                ("max_tokens", "min_tokens", "ignore_eos", "allowed_token_ids", "stop_token_ids",
                                 "bad_words")})  # fmt: skip
    return [token for token in range(TOY.vocab_size) if is_legal(without, prompt, [], token)]


def check_output(prompt, params, output) -> None:
    legal = functools.partial(is_legal, params, prompt)
    for sample in output.outputs:
        for i, token in enumerate(sample.token_ids):
            assert legal(sample.token_ids[:i], token), (params, sample)
        assert np.isfinite(sample.cumulative_logprob)
    unfinished = [sample.token_ids for sample in output.outputs if sample.finish_reason == "error"]
    assert bool(unfinished) == (output.error is not None)
    if not isinstance(params, BeamSearchParams):
        assert len(output.outputs) == params.n
    if output.error is None:
        assert output.outputs
        tokens = [tuple(sample.token_ids) for sample in output.outputs]
        assert isinstance(params, SamplingParams) or len(set(tokens)) == len(tokens)
        return
    assert "no token is left" in output.error
    # Of samples one at least was at its end; of beams all were, and so was the best one.
    ends = [not any(legal(tokens, token) for token in range(TOY.vocab_size)) for tokens in unfinished]
    assert any(ends), (params, output)


def test_forbidden_tokens_are_never_chosen(llm):
    rng = np.random.default_rng(0)
    cases = [random_case(rng) for _ in range(400)]
    runnable, num_refused = [], 0
    for prompt, params in cases:
        if first_tokens(prompt, params):
            llm.check_request(prompt, params)
            runnable.append((prompt, params))
        else:
            with pytest.raises(ValueError, match="no token can be chosen"):
                llm.check_request(prompt, params)
            num_refused += 1
    outputs = llm.generate([prompt for prompt, _ in runnable], [params for _, params in runnable])
    for (prompt, params), output in zip(runnable, outputs, strict=True):
        check_output(prompt, params, output)
    llm.engine.scheduler.check_invariants()
    num_failed = sum(output.error is not None for output in outputs)
    assert num_refused > 20 and num_failed > 20 and len(outputs) - num_failed > 100


def hypotheses(prompt, params) -> set[tuple[int, ...]]:
    """All that a search could find: every legal sequence that ends."""
    ends = {EOS, *(params.stop_token_ids or ())}
    found, running = set(), [()]
    for length in range(1, params.max_tokens + 1):
        longer = [(*output, token) for output, token in itertools.product(running, range(TOY.vocab_size))
                  if is_legal(params, prompt, list(output), token)]  # fmt: skip
        found |= {output for output in longer if output[-1] in ends or length == params.max_tokens}
        running = [output for output in longer if output[-1] not in ends]
    return found


def test_of_more_beams_than_are_possible_all_that_are_possible_are_found(llm):
    options = [
        {"allowed_token_ids": [A]},
        {"allowed_token_ids": [A, B], "bad_words": ["aa", "bb"]},
        {"allowed_token_ids": [A, EOS], "min_tokens": 2},
        {"allowed_token_ids": [A, B, C, D], "logits_processors": [rising]},
    ]
    drawn = {"do_sample": True, "seed": 1}
    searches = [
        BeamSearchParams(beam_width=16, max_tokens=4, early_stopping="never", **one, **beams)
        for one in options for beams in ({}, drawn)
    ]  # fmt: skip
    for params, output in zip(searches, llm.generate([[A - 1]] * len(searches), searches), strict=True):
        assert {tuple(sample.token_ids) for sample in output.outputs} == hypotheses([A - 1], params) != set()
        assert output.error is None and min(sample.score for sample in output.outputs) > -1000


@pytest.mark.parametrize("options, named", [
    ({"allowed_token_ids": [EOS], "min_tokens": 4}, ["allowed_token_ids has \\[1\\]", "min_tokens=4 forbids \\[1\\]"]),
    ({"allowed_token_ids": [A], "stop_token_ids": [A], "min_tokens": 1}, ["allowed_token_ids", "min_tokens=1"]),
    ({"allowed_token_ids": [A, B], "bad_words": ["a", "b"]}, ["allowed_token_ids", "bad_words forbid"]),
    ({"allowed_token_ids": [A, EOS], "bad_words": ["a"], "min_tokens": 2}, ["min_tokens=2", "bad_words forbid"]),
    ({"stop_token_ids": range(TOY.vocab_size), "min_tokens": 1}, ["min_tokens=1 forbids \\[0, 1, 2, .*\\.\\.\\.\\]"]),
])  # fmt: skip
def test_what_leaves_no_first_token_is_refused_by_name(llm, options, named):
    for params in (SamplingParams(max_tokens=4, **options), BeamSearchParams(beam_width=4, max_tokens=4, **options)):
        for words in named:
            with pytest.raises(ValueError, match=words):
                llm.generate("x", params)


def test_ends_are_possible_where_they_are_ignored_or_nothing_is_asked_of_the_length(llm):
    ignored = SamplingParams(allowed_token_ids=[EOS], min_tokens=2, max_tokens=3, ignore_eos=True)
    params = [ignored, SamplingParams(allowed_token_ids=[EOS])]
    outputs = llm.generate(["x", "x"], params)
    assert [output.outputs[0].token_ids for output in outputs] == [[EOS] * 3, [EOS]]


def test_a_sample_that_cannot_go_on_ends_its_request_and_what_was_finished_stays(llm):
    options = {"seed": 1, "max_tokens": 5, "allowed_token_ids": [A, D], "stop_token_ids": [A],
               "logits_processors": [dead_end], "logit_bias": {A: 100, D: 100}}  # fmt: skip
    samples, best = SamplingParams(n=6, **options), SamplingParams(n=1, best_of=6, **options)
    output, of_best, other = llm.generate(["x", "x", "y"], [samples, best, SamplingParams(temperature=0, max_tokens=6)])
    assert output.error == (
        "no token is left to choose after 1 generated tokens: allowed_token_ids, logits_processors made all of them "
        "impossible"
    )
    ended = {(sample.finish_reason, *sample.token_ids) for sample in output.outputs}
    assert ended == {("stop", A), ("error", D)} and len(output.outputs) == 6
    assert of_best.error == output.error and [sample.finish_reason for sample in of_best.outputs] == ["stop"]
    y = char_tokenizer().encode("y").ids
    assert other.outputs[0].token_ids == greedy_tokens(toy_params(), TOY, y, 6, 16) and other.error is None


def test_a_search_that_cannot_go_on_is_watched_to_its_end(llm):
    params = BeamSearchParams(beam_width=3, max_tokens=6, allowed_token_ids=[A, B], bad_words=["aa", "ab", "ba", "bb"])
    *_, last = llm.watch_beams("x", params)
    assert last.output.error == (
        "no token is left to choose after 1 generated tokens: allowed_token_ids, bad_words made all of them impossible"
    )
    (sample,) = last.output.outputs
    assert sample.finish_reason == "error" and sample.token_ids in ([A], [B]) and sample.score is None
    for snapshot in llm.watch_beams("x", BeamSearchParams(beam_width=4, max_tokens=3, allowed_token_ids=[A])):
        assert all(len(search.running) <= 1 and len(search.parents) <= 1 for search in snapshot.searches)
