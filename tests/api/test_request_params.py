"""What samples and beams share is written once, goes by name, and is told to whoever asks for help."""

from __future__ import annotations

import dataclasses
import pydoc
import re

import pytest

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.request_params import RequestParams
from jaxpaged.api.sampling_params import SamplingParams

KINDS = (SamplingParams, BeamSearchParams)


def names_of(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def documented(text: str) -> set[str]:
    """The names before the colon of each entry under "Attributes:"."""
    entries = re.findall(r"^ \|  {5}(\w+(?:, \w+)*): ", text, re.MULTILINE)
    return {name for entry in entries for name in entry.split(", ")}


def test_the_20_fields_that_both_kinds_have_stand_in_their_base_alone():
    assert len(names_of(RequestParams)) == 20
    assert names_of(SamplingParams) & names_of(BeamSearchParams) == names_of(RequestParams) | {"n"}
    assert not any(names_of(RequestParams) & set(vars(kind)["__annotations__"]) for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_help_lists_every_field_once(kind):
    text = pydoc.plain(pydoc.render_doc(kind))
    assert documented(text) == names_of(kind)
    assert text.count("Attributes:") == 1
    assert text.count("repetition_penalty: > 1") == 1


def test_arguments_go_by_name():
    for make in (lambda: SamplingParams(1), lambda: BeamSearchParams(4)):
        with pytest.raises(TypeError, match="takes 1 positional argument but 2 were given"):
            make()


def test_no_request_is_neither_of_samples_nor_of_beams():
    assert isinstance(SamplingParams(), RequestParams) and isinstance(BeamSearchParams(beam_width=2), RequestParams)
    with pytest.raises(TypeError, match="make SamplingParams or BeamSearchParams"):
        RequestParams()
