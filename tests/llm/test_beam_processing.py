"""What a request does to log-probabilities is done in its beams: the reference with the same changes finds the same."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from beam_reference import beam_search
from helpers import logprobs_after
from toy import char_tokenizer, save_toy_checkpoint

from jaxpaged import LLM, BeamSearchParams, SamplingParams

PROMPT = [40, 41, 42, 40, 43]
MAX_TOKENS = 8


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = save_toy_checkpoint(tmp_path_factory.mktemp("model") / "toy")
    return LLM(directory, page_size=4, num_pages=900, max_num_seqs=256, max_num_batched_tokens=64, max_model_len=64)


def no_repeat(token_ids, num_tokens, logits):
    return logits.at[token_ids[num_tokens - 1]].set(-jnp.inf)


def likes_even(token_ids, num_tokens, logits):
    return jnp.where(jnp.arange(logits.shape[0]) % 2 == 0, logits + 0.5, logits)


def changed(params: BeamSearchParams, ends: set[int]):
    """The model's log-probabilities as `params` change them, a row at a time and in the order that the guide gives."""
    words = [(char_tokenizer().encode(word).ids) for word in params.bad_words or ()]

    def row(tokens: list[int]) -> np.ndarray:
        output = tokens[len(PROMPT) :]
        logprobs = logprobs_after(tuple(tokens)).copy()
        for processor in params.logits_processors or ():
            logprobs = np.asarray(processor(jnp.asarray(tokens), len(tokens), jnp.asarray(logprobs))).copy()
        if params.allowed_token_ids:
            logprobs[np.setdiff1d(np.arange(len(logprobs)), params.allowed_token_ids)] = -np.inf
        for token, bias in (params.logit_bias or {}).items():
            logprobs[token] += np.float32(bias)
        if len(output) < params.min_tokens:
            logprobs[list(ends)] = -np.inf
        for *before, last in words:
            if output[len(output) - len(before) :] == before:
                logprobs[last] = -np.inf
        seen, counts = np.isin(np.arange(97), tokens), np.bincount(output, minlength=97)
        repetition = np.float32(params.repetition_penalty)
        logprobs = np.where(seen, np.where(logprobs > 0, logprobs / repetition, logprobs * repetition), logprobs)
        return (
            logprobs
            - np.float32(params.presence_penalty) * (counts > 0)
            - np.float32(params.frequency_penalty) * counts.astype(np.float32)
        )

    return lambda sequences: np.stack([row(tokens) for tokens in sequences])


CHANGES = [
    dict(repetition_penalty=1.4),
    dict(presence_penalty=0.8, frequency_penalty=0.5),
    dict(frequency_penalty=-0.3, length_penalty=0.0),
    dict(logit_bias={7: 3.0, 31: -100.0, 60: 1.25}),
    dict(allowed_token_ids=[31, 94, 12, 50, 51, 52, 60]),
    dict(bad_words=["a", "}z"]),
    dict(logits_processors=[no_repeat]),
    dict(logits_processors=[likes_even, no_repeat], repetition_penalty=1.2, early_stopping=True),
    dict(min_tokens=5, stop_token_ids=[31, 94]),
    dict(stop_token_ids=[31, 94], early_stopping="never"),
]


@pytest.mark.slow
def test_every_change_in_one_batch_beside_samples_and_greedy_requests(llm):
    """Also that processors act on a sample's logits and on a beam's log-probabilities in one and the same step."""
    requests = [BeamSearchParams(beam_width=3, max_tokens=MAX_TOKENS, **change) for change in CHANGES]
    sampled = SamplingParams(n=3, seed=5, max_tokens=MAX_TOKENS, logits_processors=[no_repeat], repetition_penalty=1.4)
    greedy = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logits_processors=[likes_even])
    alone = [llm.generate([PROMPT], one)[0].outputs for one in (sampled, greedy)]
    outputs = llm.generate([PROMPT] * (len(requests) + 2), [*requests, sampled, greedy])
    for params, output in zip(requests, outputs, strict=False):
        ends = {1, *(params.stop_token_ids or ())}
        expected = beam_search(
            changed(params, ends), PROMPT, 3, MAX_TOKENS, ends, params.length_penalty, params.early_stopping
        )
        expected = [(tokens[len(PROMPT) :], score) for tokens, score, is_finished in expected if is_finished]
        assert [beam.token_ids for beam in output.outputs] == [tokens for tokens, _ in expected], params
        np.testing.assert_allclose([b.score for b in output.outputs], [s for _, s in expected], rtol=1e-5, atol=1e-4)
    for one, output in zip(alone, outputs[-2:], strict=True):
        assert [s.token_ids for s in output.outputs] == [s.token_ids for s in one]


def test_a_step_with_beams_and_samples_processes_once(llm):
    calls = []

    def counted(token_ids, num_tokens, logits):
        calls.append(1)
        return logits

    params = [
        BeamSearchParams(beam_width=2, max_tokens=3, logits_processors=[counted]),
        SamplingParams(temperature=0, max_tokens=3, logits_processors=[counted]),
    ]
    llm.generate([PROMPT, PROMPT], params)
    # The prefill step and the decode step, which has a program for beams that go on from what the device has, trace it
    # once each, and once more for what their programs are known by.
    assert len(calls) == 6


@pytest.mark.slow
def test_widths_from_1_to_256_each_its_own_request(llm):
    widths = [1, 2, 7, 16, 64, 100, 256]
    params = [BeamSearchParams(beam_width=width, max_tokens=4, ignore_eos=True) for width in widths]
    for width, output in zip(widths, llm.beam_search([PROMPT] * len(widths), params), strict=True):
        expected = beam_search(changed(BeamSearchParams(beam_width=1), set()), PROMPT, width, 4, set())
        assert [beam.token_ids for beam in output.outputs] == [tokens[len(PROMPT) :] for tokens, _, _ in expected]


def test_the_models_end_of_sequence_ends_a_beam_unless_it_is_ignored(llm):
    likes_end = {1: 4.0}
    ended = llm.beam_search([PROMPT], BeamSearchParams(beam_width=3, max_tokens=6, logit_bias=likes_end))[0].outputs
    first = next(beam for beam in ended if beam.finish_reason == "stop")
    assert (first.token_ids[-1], first.stop_reason) == (1, None)
    assert first.score == pytest.approx(first.cumulative_logprob / len(first.token_ids))  # the ending token counts
    ignoring = BeamSearchParams(beam_width=3, max_tokens=6, logit_bias=likes_end, ignore_eos=True)
    ignored = llm.beam_search([PROMPT], ignoring)
    assert all(len(beam.token_ids) == 6 and beam.finish_reason == "length" for beam in ignored[0].outputs)
    both = BeamSearchParams(beam_width=3, max_tokens=6, logit_bias=likes_end, ignore_eos=True, stop_token_ids=[1])
    (output,) = llm.beam_search([PROMPT], both)
    assert [b.token_ids for b in output.outputs] == [b.token_ids for b in ended]
    assert any(beam.stop_reason == 1 for beam in output.outputs)


def test_a_stop_string_that_is_complete_before_min_tokens_ends_nothing(llm):
    (output,) = llm.beam_search([PROMPT], BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True))
    likeliest = output.outputs[0].text
    stop = likeliest[1]

    def beams(min_tokens):
        params = BeamSearchParams(beam_width=2, max_tokens=6, stop=stop, min_tokens=min_tokens, ignore_eos=True)
        return llm.beam_search([PROMPT], params)[0].outputs

    assert [2] == [len(beam.token_ids) for beam in beams(2) if beam.text + stop == likeliest[:2]]
    assert all(len(beam.token_ids) >= 3 for beam in beams(3))
    assert any(beam.text.startswith(likeliest[:2]) for beam in beams(3))
