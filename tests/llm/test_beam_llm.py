"""Beam search as a user calls it: results best first, beside samples and greedy requests, ended in every way."""

from __future__ import annotations

import pytest
from toy import char_tokenizer, save_toy_checkpoint

from jaxpaged import LLM, BeamSearchParams, SamplingParams

PROMPT = "four score"


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = save_toy_checkpoint(tmp_path_factory.mktemp("model") / "toy")
    return LLM(directory, page_size=4, num_pages=120, max_num_seqs=16, max_num_batched_tokens=64, max_model_len=128)


def search(llm, prompt=PROMPT, **params):
    (output,) = llm.beam_search(prompt, BeamSearchParams(**{"beam_width": 4, "max_tokens": 10, **params}))
    return output.outputs


def found(outputs):
    return [(o.token_ids, o.score) for o in outputs]


def test_results_are_best_first_and_scores_are_what_they_say(llm):
    outputs = search(llm, length_penalty=0.5, ignore_eos=True)
    assert [o.index for o in outputs] == [0, 1, 2, 3]
    assert [o.score for o in outputs] == sorted((o.score for o in outputs), reverse=True)
    for output in outputs:
        assert output.score == pytest.approx(output.cumulative_logprob / len(output.token_ids) ** 0.5)
        assert output.finish_reason == "length" and len(output.token_ids) == 10
        assert output.text == char_tokenizer().decode(output.token_ids)
    assert found(search(llm, n=2, length_penalty=0.5, ignore_eos=True)) == found(outputs)[:2]


def test_a_search_is_the_same_alone_and_beside_anything(llm):
    alone = search(llm)
    narrow = BeamSearchParams(beam_width=3, max_tokens=7)
    others = [SamplingParams(n=3, max_tokens=12), narrow, SamplingParams(temperature=0)]
    outputs = llm.generate(
        ["one", PROMPT, "two", "three"], [others[0], BeamSearchParams(beam_width=4, max_tokens=10), *others[1:]]
    )
    assert [o.token_ids for o in outputs[1].outputs] == [o.token_ids for o in alone]
    assert [len(output.outputs) for output in outputs] == [3, 4, 3, 1]
    assert outputs[0].outputs[0].score is None


def test_stop_tokens_end_a_beam_and_are_left_out_of_its_text(llm):
    token = search(llm, ignore_eos=True)[0].token_ids[4]
    outputs = search(llm, stop_token_ids=[token], ignore_eos=True)
    ended = [o for o in outputs if o.finish_reason == "stop"]
    assert ended
    for output in ended:
        assert output.token_ids[-1] == token == output.stop_reason
        assert output.text == char_tokenizer().decode(output.token_ids[:-1])
    assert all(token not in o.token_ids[:-1] for o in outputs)


def test_stop_strings_end_a_beam_and_cut_its_text(llm):
    text = search(llm, ignore_eos=True)[0].text
    stop = text[3:5]
    cut = [o for o in search(llm, stop=stop, ignore_eos=True) if o.finish_reason == "stop"]
    assert cut and all(stop not in o.text and o.stop_reason == stop for o in cut)
    whole = search(llm, stop=stop, ignore_eos=True, include_stop_str_in_output=True)
    assert [o.text for o in whole if o.finish_reason == "stop"] == [o.text + stop for o in cut]


def test_nothing_ends_before_min_tokens(llm):
    likely = sorted({token for o in search(llm, ignore_eos=True) for token in o.token_ids})
    assert min(len(o.token_ids) for o in search(llm, stop_token_ids=likely, early_stopping=True)) < 6
    outputs = search(llm, stop_token_ids=likely, min_tokens=6, early_stopping=True)
    assert min(len(o.token_ids) for o in outputs) >= 6


def test_banned_and_allowed_tokens_hold(llm):
    token = search(llm)[0].token_ids[0]
    assert all(token not in o.token_ids for o in search(llm, logit_bias={token: -100}))
    allowed = [10, 11, 12]
    assert {t for o in search(llm, allowed_token_ids=allowed, ignore_eos=True) for t in o.token_ids} <= set(allowed)


def test_drawn_beams_follow_their_seed_alone(llm):
    drawn = dict(do_sample=True, temperature=1.5, ignore_eos=True)
    first = found(search(llm, seed=7, **drawn))
    params = [BeamSearchParams(beam_width=4, max_tokens=10, seed=7, **drawn), SamplingParams(n=4, max_tokens=9)]
    assert found(llm.generate([PROMPT, "other"], params)[0].outputs) == first
    assert found(search(llm, seed=8, **drawn)) != first
    assert first != found(search(llm, ignore_eos=True))


def test_diverse_groups_begin_differently(llm):
    alike = search(llm, ignore_eos=True, max_tokens=1)
    outputs = search(llm, num_beam_groups=4, diversity_penalty=50.0, ignore_eos=True, max_tokens=4)
    assert len({o.token_ids[0] for o in outputs}) == 4
    assert len(alike) == 4


def test_the_prompt_is_prefilled_once_and_its_pages_are_shared(llm):
    (output,) = llm.beam_search("a" * 40, BeamSearchParams(beam_width=8, max_tokens=4, ignore_eos=True))
    assert llm.last_run.num_prompt_tokens == 40
    assert output.kv.pages_shared >= 7 * 10  # eight beams read the ten full pages of the prompt
    assert output.kv.pages_at_peak <= 10 + 8


@pytest.mark.slow
def test_after_warm_up_a_search_compiles_nothing(llm):
    params = BeamSearchParams(beam_width=3, max_tokens=5)
    llm.warm_up(params)
    llm.beam_search([PROMPT, "x"], params)
    assert llm.last_run.programs_made == 0


@pytest.mark.parametrize(
    "params, message",
    [
        (dict(logprobs=98), "logprobs=98 exceeds the vocabulary of 97"),
        (dict(beam_width=17), "17 samples of one request exceed max_num_seqs=16"),
        (dict(allowed_token_ids=[1000]), "1000"),
        (dict(max_tokens=200, beam_width=16), "needs .* pages"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(llm, params, message):
    with pytest.raises(ValueError, match=message):
        search(llm, **params)


def test_beam_search_takes_beam_search_params(llm):
    with pytest.raises(ValueError, match="beam_search takes a BeamSearchParams"):
        llm.beam_search(PROMPT, SamplingParams())
