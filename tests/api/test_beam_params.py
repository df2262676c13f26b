"""BeamSearchParams refuses what cannot be searched, and says what to change."""

from __future__ import annotations

import pytest

from jaxpaged.api.beam_params import BeamSearchParams


def test_defaults_return_every_beam():
    params = BeamSearchParams(beam_width=4)
    assert (params.num_returned, params.num_samples, params.group_width, params.max_tokens) == (4, 4, 4, 16)
    assert (params.length_penalty, params.early_stopping, params.stop_strings) == (1.0, False, ())
    assert BeamSearchParams(beam_width=4, n=2).num_returned == 2
    assert BeamSearchParams(beam_width=256, max_tokens=None, num_beam_groups=32, diversity_penalty=0.5).group_width == 8
    assert BeamSearchParams(beam_width=1, early_stopping="never", stop="\n").stop_strings == ("\n",)


def test_the_arguments_of_vllm_are_taken():
    params = BeamSearchParams(beam_width=2, max_tokens=8, ignore_eos=True, temperature=0.0, length_penalty=0.5)
    assert not params.do_sample


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(beam_width=0), "beam_width must be at least 1, got 0"),
        (dict(beam_width=True), "beam_width must be an integer"),
        (dict(beam_width=2.0), "beam_width must be an integer"),
        (dict(n=0), "n must be at least 1"),
        (dict(beam_width=[]), "has no number of beams: give one a step"),
        (dict(beam_width=[4, 0]), r"beam_width\[1\] must be at least 1, got 0"),
        (dict(beam_width=[4, 2.5]), r"beam_width\[1\] must be an integer"),
        (dict(beam_width="44"), "beam_width must be an integer"),
        (dict(beam_width=[9, 3], n=4), "n=4 hypotheses cannot be returned of the beam_width=3"),
        (dict(beam_width=[4, 8], num_beam_groups=2, diversity_penalty=1.0), "give a number instead of a list"),
        (dict(n=5), "n=5 hypotheses cannot be returned of the beam_width=4"),
        (dict(max_tokens=0), "max_tokens must be at least 1"),
        (dict(min_tokens=17), "min_tokens=17 exceeds max_tokens=16"),
        (dict(length_penalty=float("nan")), "length_penalty must be a number"),
        (dict(length_penalty=-5.5), r"length_penalty must be in \[-5, 5\], got -5.5"),
        (dict(early_stopping=1), "early_stopping must be False, True or 'never', got 1"),
        (dict(early_stopping="always"), "early_stopping must be False, True or 'never'"),
        (dict(do_sample=1), "do_sample must be True or False"),
        (dict(do_sample=True, temperature=0), "leaves nothing to draw"),
        (dict(do_sample=True, temperature=float("inf")), "finite"),
        (dict(temperature=0.5), "set do_sample=True"),
        (dict(num_beam_groups=3, diversity_penalty=1.0), "make it a multiple"),
        (dict(num_beam_groups=0), "num_beam_groups must be at least 1"),
        (dict(num_beam_groups=2), "set it above 0"),
        (dict(diversity_penalty=1.0), "raise num_beam_groups"),
        (dict(num_beam_groups=2, diversity_penalty=-1.0), "0 or more"),
        (dict(num_beam_groups=2, diversity_penalty=1.0, do_sample=True), "use one of the two"),
        (dict(stop=[""]), "would end every beam at once"),
        (dict(stop="a", detokenize=False), "need detokenize=True"),
        (dict(stop_token_ids=[1.5]), "stop_token_ids must be a list of token ids"),
        (dict(allowed_token_ids=[]), "no token could be chosen"),
        (dict(logit_bias=[1]), "logit_bias must map"),
        (dict(logits_processors=[3]), "must be callables"),
        (dict(repetition_penalty=0), "1 means no penalty"),
        (dict(presence_penalty=3), r"in \[-2, 2\]"),
        (dict(logprobs=-2), "logprobs must be at least -1"),
        (dict(seed=-1), "seed must be at least 0"),
        (dict(ignore_eos=1), "ignore_eos must be True or False"),
    ],
)
def test_what_cannot_be_searched_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        BeamSearchParams(**{"beam_width": 4, **fields})


def test_a_list_of_widths_is_copied_and_its_last_number_is_that_of_the_hypotheses():
    widths = [10, 80, 50]
    params = BeamSearchParams(beam_width=widths)
    widths[0] = 1
    assert params.widths == (10, 80, 50) and params.num_returned == 50 and params.num_samples == 80


def test_token_ids_outside_the_vocabulary_are_refused():
    BeamSearchParams(beam_width=2, stop_token_ids=[9], logit_bias={0: 1.0}).check_token_ids(10)
    with pytest.raises(ValueError, match="stop_token_ids has token id 10; the vocabulary has ids 0 to 9"):
        BeamSearchParams(beam_width=2, stop_token_ids=[10]).check_token_ids(10)
