"""`on_token`: every token when it has come, in order, with the text that it adds; what it raises leaves no trace."""

from __future__ import annotations

from collections import defaultdict

import pytest
from helpers import small_llm
from toy import save_toy_checkpoint

from jaxpaged import BeamSearchParams, NewToken, SamplingParams


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return save_toy_checkpoint(tmp_path_factory.mktemp("told") / "toy")


@pytest.fixture(scope="module")
def llm(toy):
    return small_llm(toy)


def collected(tokens: list[NewToken]):
    """By request and sample: token ids, text, and the reasons that were given."""
    ids, texts, reasons = defaultdict(list), defaultdict(str), defaultdict(list)
    for token in tokens:
        key = token.request_id, token.sample
        ids[key].append(token.token_id)
        texts[key] += token.text
        reasons[key].append(token.finish_reason)
    return ids, texts, reasons


def check_told(outputs, tokens):
    ids, texts, reasons = collected(tokens)
    for output in outputs:
        for sample in output.outputs:
            key = output.request_id, sample.index
            assert (ids[key], texts[key]) == (sample.token_ids, sample.text)
            assert reasons[key] == [None] * (len(sample.token_ids) - 1) + [sample.finish_reason]
    assert len(ids) == sum(len(output.outputs) for output in outputs)


PARAMS = [
    SamplingParams(n=2, seed=0, max_tokens=9, ignore_eos=True),
    SamplingParams(n=3, seed=1, max_tokens=12),
    SamplingParams(seed=2, max_tokens=1, detokenize=False),
    SamplingParams(n=2, seed=3, max_tokens=20, skip_special_tokens=False),
]
PROMPTS = ["ab", "the cat", "x y z", "0123456789"]


def test_tokens_come_in_order_and_their_texts_join_to_the_text(llm):
    tokens: list[NewToken] = []
    outputs = llm.generate(PROMPTS, PARAMS, on_token=tokens.append)
    check_told(outputs, tokens)
    assert sample_ids(llm.generate(PROMPTS, PARAMS)) == sample_ids(outputs)


def sample_ids(outputs):
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


@pytest.mark.parametrize("included", [False, True])
def test_no_piece_has_what_becomes_a_stop_string(llm, included):
    text = llm.generate("ab", PARAMS[0])[0].outputs[0].text
    tokens: list[NewToken] = []
    params = SamplingParams(n=2, seed=0, max_tokens=9, stop=[text[4:7], "nothing"], include_stop_str_in_output=included)
    outputs = llm.generate("ab", params, on_token=tokens.append)
    assert outputs[0].outputs[0].stop_reason == text[4:7]
    check_told(outputs, tokens)


def test_tokens_are_told_while_the_run_goes_on(llm):
    steps = []
    llm.generate("ab", PARAMS[0], on_token=lambda _: steps.append(llm.last_run.steps))
    assert steps == sorted(steps) and len(set(steps)) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_request_that_gives_way_is_told_once(toy, preemption):
    llm = small_llm(toy, num_pages=12, preemption=preemption)
    tokens: list[NewToken] = []
    params = SamplingParams(n=2, seed=7, max_tokens=12, ignore_eos=True)
    outputs = llm.generate(["abcd", "efgh", "ijkl"], params, on_token=tokens.append)
    assert llm.last_run.preemptions > 0
    check_told(outputs, tokens)


def test_a_conversation_is_told_too(llm):
    tokens: list[NewToken] = []
    messages = [{"role": "user", "content": "ab"}]
    outputs = llm.chat(messages, PARAMS[0], chat_template="{{ messages[0].content }}", on_token=tokens.append)
    check_told(outputs, tokens)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, GeneratorExit, StopIteration])
def test_what_it_raises_is_raised_and_the_next_call_works(llm, error):
    before = llm.generate(PROMPTS, PARAMS)
    count = 0

    def fail(_token):
        nonlocal count
        count += 1
        if count == 7:
            raise error

    with pytest.raises(error):
        llm.generate(PROMPTS, PARAMS, on_token=fail)
    assert count == 7
    assert llm.engine.scheduler.allocator.num_used == 0
    llm.engine.scheduler.check_invariants()
    assert sample_ids(llm.generate(PROMPTS, PARAMS)) == sample_ids(before)


def test_a_call_from_within_is_refused_and_the_run_goes_on(llm):
    refusals = []

    def call(_token):
        with pytest.raises(RuntimeError, match="another call is in progress") as refusal:
            llm.generate("x")
        refusals.append(refusal)

    (output,) = llm.generate("ab", PARAMS[0], on_token=call)
    assert len(refusals) == sum(len(sample.token_ids) for sample in output.outputs) == 18


def test_beams_and_what_cannot_be_called_are_refused_before_anything_runs(llm):
    with pytest.raises(ValueError, match=r"beam search \(prompt 1\).*use watch_beams"):
        llm.generate(["a", "b"], [PARAMS[0], BeamSearchParams(beam_width=2)], on_token=print)
    with pytest.raises(ValueError, match="on_token must be a function"):
        llm.generate("a", on_token="print")
