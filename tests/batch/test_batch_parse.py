"""Input files of every kind: which format, which prompts, and which lines are errors under which name."""

import codecs
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpaged import BeamSearchParams, SamplingParams
from jaxpaged.batch import BatchContext, BatchRequest, InvalidLine, parse_batch
from jaxpaged.batch.model_files import model_identity

CONTEXT = BatchContext(identity="model")


def parse(data, context=CONTEXT, file_format="auto"):
    return parse_batch(data if isinstance(data, bytes) else data.encode(), context, file_format)


def parse_one(line: dict, context=CONTEXT):
    (entry,) = parse(json.dumps(line), context)
    return entry


def reason_of(line: dict) -> str:
    entry = parse_one(line)
    assert isinstance(entry, InvalidLine)
    return entry.reason


def prompts(data, **options):
    return [(entry.index, entry.prompts) for entry in parse(data, **options)]


def test_plain_text_is_a_prompt_a_line_and_blank_lines_are_only_counted():
    assert prompts("one\n\n  two \r\n \nthree") == [(0, ["one"]), (2, ["  two "]), (4, ["three"])]


def test_a_byte_order_mark_is_not_part_of_the_first_prompt():
    assert prompts(codecs.BOM_UTF8 + b"one\n") == [(0, ["one"])]
    assert prompts(codecs.BOM_UTF8 + b'{"prompt": "one"}\n') == [(0, ["one"])]


def test_an_empty_file_has_no_lines():
    assert parse(b"") == [] == parse(b"\n \n")


def test_utf16_and_a_json_list_are_refused_as_a_whole_with_what_to_do():
    with pytest.raises(ValueError, match="UTF-8"):
        parse("one\n".encode("utf-16"))
    for text in ('[{"prompt": "a"}]', '[\n  {"prompt": "a"}\n]'):
        with pytest.raises(ValueError, match="one object a line"):
            parse(text)
    assert prompts("[\nx", file_format="text") == [(0, ["["]), (1, ["x"])]


def test_in_a_json_file_a_broken_line_is_an_error_and_never_a_prompt():
    good, broken, text, after = parse('{"prompt": "a"}\n{"prompt": "b"\nhello\n{"prompt": "c"}')
    assert isinstance(good, BatchRequest) and isinstance(after, BatchRequest)
    assert isinstance(broken, InvalidLine) and broken.reason.startswith("not JSON: ") and "column 15" in broken.reason
    assert isinstance(text, InvalidLine) and text.index == 2


def test_a_first_line_that_is_a_broken_object_still_makes_it_a_json_file():
    broken, good = parse('{"prompt": \n{"prompt": "a"}')
    assert isinstance(broken, InvalidLine) and isinstance(good, BatchRequest)


def test_the_format_can_be_said():
    assert prompts('{"prompt": "a"}', file_format="text") == [(0, ['{"prompt": "a"}'])]
    assert isinstance(parse("hello", file_format="jsonl")[0], InvalidLine)


def test_bytes_that_are_no_utf8_are_an_error_of_their_line_alone():
    before, bad, after = parse(b"one\ntw\xff\nthree")
    assert isinstance(before, BatchRequest) and isinstance(after, BatchRequest)
    assert isinstance(bad, InvalidLine) and bad.reason == "not UTF-8: byte 0xff at column 3"


def test_a_line_overrides_the_command_line():
    context = BatchContext({"temperature": 0.5, "max_tokens": 3})
    own, default = parse('{"prompt": "a", "temperature": 0.0, "id": "x"}\n{"prompt": "b"}', context)
    assert (own.id, own.params[0].temperature, own.params[0].max_tokens) == ("x", 0.0, 3)
    assert (default.id, default.params[0].temperature) == ("1", 0.5)


def test_token_ids_are_prompts_under_either_name():
    assert parse_one({"prompt": [1, 2]}).prompts == [[1, 2]] == parse_one({"prompt_token_ids": [1, 2]}).prompts


def test_logit_bias_keys_become_token_ids():
    assert parse_one({"prompt": "a", "logit_bias": {"7": -100}}).params[0].logit_bias == {7: -100}


@pytest.mark.parametrize(
    "line, named",
    [
        ({}, "has none of them"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "has prompt and prompt_token_ids"),
        ({"prompt": 3}, "prompt must be a string"),
        ({"prompt": []}, "prompt must be a string"),
        ({"prompt": [True]}, "prompt must be a string"),
        ({"prompt": ["a"]}, "prompt must be a string"),
        ({"prompt_token_ids": "a"}, "prompt_token_ids must be a list"),
        ({"prompt": "a\ud800"}, "not Unicode text"),
        ({"prompt": "a", "temprature": 1}, "unknown key 'temprature'"),
        ({"prompt": "a", "logits_processors": []}, "unknown key 'logits_processors'"),
        ({"prompt": "a", "temperature": "hot"}, "temperature must be a number"),
        ({"prompt": "a", "n": 2.0}, "n must be an integer"),
        ({"prompt": "a", "stop": 5}, "stop must be a list of strings"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias token id must be an integer"),
        ({"prompt": "a", "logit_bias": [1]}, "logit_bias must map"),
        ({"prompt": "a", "id": [1]}, "id must be a string or an integer"),
    ],
)
def test_what_is_wrong_is_named(line, named):
    assert named in reason_of(line)


def test_json_that_python_cannot_hold_is_an_error_of_its_line():
    deep, long, good = parse(
        "[" * 100_000 + "\n" + '{"seed": ' + "9" * 5000 + '}\n{"prompt": "a"}', file_format="jsonl"
    )
    assert isinstance(deep, InvalidLine) and isinstance(long, InvalidLine) and isinstance(good, BatchRequest)


def test_a_seed_of_a_line_depends_on_the_runs_seed_and_its_number_only():
    first, second = (entry.params[0].seed for entry in parse("same\nsame"))
    assert first != second
    assert [entry.params[0].seed for entry in parse("other\nsame")] == [first, second]
    assert parse("same", BatchContext(seed=1))[0].params[0].seed != first
    assert parse_one({"prompt": "a", "seed": 5}).params[0].seed == 5


def test_a_fingerprint_covers_what_decides_the_result_and_not_how_it_is_written():
    base = parse_one({"prompt": "a", "n": 1})
    assert parse('{"n":1,  "prompt":"a"}')[0].fingerprint == base.fingerprint
    assert parse_one({"prompt": "a"}).fingerprint == base.fingerprint  # the default, said or not
    others = [
        parse_one({"prompt": "b"}),
        parse_one({"prompt": "a", "n": 2}),
        parse_one({"prompt": "a", "id": "x"}),
        parse_one({"prompt": "a"}, BatchContext(identity="other model")),
        parse_one({"prompt": "a"}, BatchContext(identity="model", seed=1)),
        parse('\n{"prompt": "a"}')[0],
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 1 + len(others)
    elsewhere = parse_one({"prompt": "a"}, BatchContext(identity="model", options="--num-pages 7"))
    assert elsewhere.fingerprint == base.fingerprint and elsewhere.error_fingerprint != base.error_fingerprint


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
known_keys = st.sampled_from(
    [
        "id",
        "prompt",
        "n",
        "seed",
        "stop",
        "logit_bias",
        "temperature",
        "max_tokens",
        "custom_id",
        "method",
        "url",
        "body",
    ]
)


@given(st.dictionaries(known_keys | st.text(max_size=5), json_values, max_size=6))
def test_any_object_is_a_request_or_an_error_of_its_line(line):
    entry = parse_one(line)
    assert isinstance(entry, BatchRequest | InvalidLine) and entry.index == 0


@given(st.binary(max_size=200))
def test_any_bytes_give_an_entry_for_each_line_that_is_not_blank(data):
    try:
        entries = parse(data)
    except ValueError:
        return  # the file as a whole, UTF-16 or a JSON list
    content = data.removeprefix(codecs.BOM_UTF8)
    assert [e.index for e in entries] == [i for i, line in enumerate(content.split(b"\n")) if line.strip()]


def test_the_identity_of_a_model_changes_with_a_weight_and_not_with_notes(tmp_path):
    weights = bytearray(100_000)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(weights)
    identity = model_identity(tmp_path)
    (tmp_path / "README.md").write_text("notes")
    (tmp_path / "out.jsonl").write_text("{}")
    assert model_identity(tmp_path) == identity
    weights[50_000] = 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert model_identity(tmp_path) != identity
    with pytest.raises(FileNotFoundError, match="does not exist"):
        model_identity(tmp_path / "missing")


def test_a_line_with_a_beam_width_is_a_beam_search():
    line = {"prompt": "a", "beam_width": 4, "length_penalty": 0.5, "early_stopping": "never", "n": 2}
    (params,) = parse_one(line).params
    assert params == BeamSearchParams(beam_width=4, n=2, length_penalty=0.5, early_stopping="never", seed=params.seed)
    body = {"prompt": ["a", "b"], "beam_width": 3, "max_tokens": 5}
    request = parse_one({"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": body})
    assert [type(p) for p in request.params] == [BeamSearchParams] * 2


def test_defaults_of_the_other_kind_are_left_out():
    context = BatchContext({"temperature": 0.7, "top_p": 0.9, "max_tokens": 8, "length_penalty": 2.0}, identity="model")
    (sampled,) = parse_one({"prompt": "a"}, context).params
    assert (type(sampled), sampled.temperature, sampled.top_p, sampled.max_tokens) == (SamplingParams, 0.7, 0.9, 8)
    (searched,) = parse_one({"prompt": "a", "beam_width": 2}, context).params
    assert (type(searched), searched.temperature, searched.length_penalty) == (BeamSearchParams, 1.0, 2.0)
    (drawn,) = parse_one({"prompt": "a", "beam_width": 2, "do_sample": True}, context).params
    assert drawn.temperature == 0.7
    everywhere = BatchContext({"beam_width": 2}, identity="model")
    assert isinstance(parse_one({"prompt": "a"}, everywhere).params[0], BeamSearchParams)
    assert isinstance(parse_one({"prompt": "a", "beam_width": None}, everywhere).params[0], SamplingParams)


@pytest.mark.parametrize(
    "line, words",
    [
        ({"beam_width": 2, "top_p": 0.5}, "top_p is of no use to a beam search"),
        ({"length_penalty": 0.5}, "length_penalty belongs to beam search: give beam_width too"),
        ({"beam_width": 2, "temperature": 0.5}, "set do_sample=True"),
        ({"beam_width": 0}, "beam_width must be at least 1"),
        ({"beam_width": 2, "n": 3}, "n=3 hypotheses cannot be returned"),
    ],
)
def test_parameters_of_the_other_kind_are_errors_of_their_line(line, words):
    assert words in reason_of({"prompt": "a", **line})


def test_a_beam_width_is_part_of_the_fingerprint():
    prints = [parse_one({"prompt": "a", **more}).fingerprint for more in ({}, {"beam_width": 2}, {"beam_width": 3})]
    assert len(set(prints)) == 3
