"""Log-probabilities of a beam's tokens are the model's own, whichever parents led there: held against recomputation."""

from __future__ import annotations

import numpy as np
import pytest
from beam_reference import beam_search
from helpers import logprobs_after, reference_model
from toy import TOY, beam_group, make_group, save_toy_checkpoint

from jaxpaged import LLM, BeamSearchParams, SamplingParams
from jaxpaged.host.step.features import SamplingFeatures

PROMPT = [40, 41, 42, 40, 43]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = save_toy_checkpoint(tmp_path_factory.mktemp("model") / "toy")
    return LLM(directory, page_size=4, num_pages=400, max_num_seqs=64, max_num_batched_tokens=64, max_model_len=64)


def assert_are_the_models(beam, count: int, prompt=PROMPT) -> None:
    assert len(beam.logprobs) == len(beam.token_ids)
    for i, (token, entry) in enumerate(zip(beam.token_ids, beam.logprobs, strict=True)):
        expected = logprobs_after((*prompt, *beam.token_ids[:i]))
        likeliest = np.argsort(-expected, kind="stable")[:count].tolist()
        assert list(entry)[0] == token and set(entry) == {token, *likeliest}
        for other, logprob in entry.items():
            assert logprob.logprob == pytest.approx(expected[other], abs=1e-4)
            least, most = (1 + (expected > expected[other] + tie).sum() for tie in (1e-5, -1e-5))
            assert least <= logprob.rank <= most


@pytest.mark.parametrize(
    "fields, count",
    [
        (dict(beam_width=4), 3),
        pytest.param(dict(beam_width=4), 0, marks=pytest.mark.slow),
        pytest.param(dict(beam_width=3), -1, marks=pytest.mark.slow),
        (dict(beam_width=4, stop_token_ids=[31, 94]), 2),
        (dict(beam_width=6, num_beam_groups=3, diversity_penalty=1.5), 2),
        pytest.param(dict(beam_width=4, do_sample=True, temperature=1.4, seed=3), 2, marks=pytest.mark.slow),
        pytest.param(dict(beam_width=4, repetition_penalty=1.5, logit_bias={7: 5.0}), 2, marks=pytest.mark.slow),
        (dict(beam_width=32), 2),  # whose rows the device merges
        (dict(beam_width=32, do_sample=True, seed=4), 2),
        pytest.param(dict(beam_width=32, frequency_penalty=1.0), -1, marks=pytest.mark.slow),
    ],
)
def test_every_token_of_every_beam(llm, fields, count):
    params = BeamSearchParams(**{"max_tokens": 7, "logprobs": count, **fields})
    (output,) = llm.beam_search([PROMPT], params)
    assert len(output.outputs) == params.beam_width
    for beam in output.outputs:
        assert_are_the_models(beam, 97 if count == -1 else count)
        if set(fields) <= {"beam_width", "stop_token_ids"}:
            total = sum(entry[token].logprob for token, entry in zip(beam.token_ids, beam.logprobs, strict=True))
            assert beam.cumulative_logprob == pytest.approx(total, abs=1e-4)


@pytest.mark.slow
def test_each_request_of_a_batch_gets_what_it_asked_for(llm):
    params = [
        BeamSearchParams(beam_width=3, max_tokens=6, logprobs=2),
        BeamSearchParams(beam_width=2, max_tokens=6),
        SamplingParams(n=2, seed=1, max_tokens=6, logprobs=4),
        BeamSearchParams(beam_width=16, max_tokens=5, logprobs=0),
    ]
    beams, plain, samples, wide = llm.generate([PROMPT] * 4, params)
    for output, count in ((beams, 2), (samples, 4), (wide, 0)):
        for one in output.outputs:
            assert_are_the_models(one, count)
    assert all(beam.logprobs is None for beam in plain.outputs)


@pytest.mark.slow
def test_they_do_not_depend_on_preemption(llm, tmp_path):
    prompts = [[i + 3, *PROMPT] for i in range(5)]
    tight = LLM(save_toy_checkpoint(tmp_path / "toy"), page_size=4, num_pages=40, max_num_seqs=32, max_model_len=64)
    outputs = tight.beam_search(prompts, BeamSearchParams(beam_width=5, max_tokens=16, logprobs=1, ignore_eos=True))
    assert tight.last_run.preemptions > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        for beam in output.outputs:
            assert_are_the_models(beam, 1, prompt)


@pytest.mark.parametrize(
    "others", [[], pytest.param([SamplingParams(n=2, seed=1, max_tokens=6)], marks=pytest.mark.slow)]
)
def test_groups_that_the_device_merges_find_what_the_reference_finds(llm, others):
    widths = [16, 20, 9]
    params = [BeamSearchParams(beam_width=width, max_tokens=5, ignore_eos=True) for width in widths]
    outputs = llm.generate([PROMPT] * (3 + len(others)), [*params, *others])
    asked = [make_group([1], p) if isinstance(p, SamplingParams) else beam_group([1], p, ()) for p in params + others]
    features = SamplingFeatures.of(asked, TOY.vocab_size)
    assert features.merged_widths == (8, 32) and features.draws_tokens == bool(others)
    for width, output in zip(widths, outputs, strict=False):
        expected = beam_search(reference_model, PROMPT, width, 5, set())
        assert [beam.token_ids for beam in output.outputs] == [tokens[len(PROMPT) :] for tokens, _, _ in expected]
        np.testing.assert_allclose([b.score for b in output.outputs], [s for _, s, _ in expected], atol=1e-4)


@pytest.mark.slow
def test_after_warm_up_wide_beams_with_logprobs_compile_nothing(tmp_path):
    directory = save_toy_checkpoint(tmp_path / "toy")
    llm = LLM(directory, page_size=4, num_pages=100, max_num_seqs=16, max_num_batched_tokens=64, max_model_len=64)
    params = BeamSearchParams(beam_width=16, max_tokens=5, logprobs=2)
    llm.warm_up(params)
    llm.beam_search([PROMPT, [5], [6, 7]], params)  # a prompt of one token may go through a decode step, but not here
    assert llm.last_run.programs_made == 0
