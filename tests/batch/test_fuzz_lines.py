"""Whatever a line of an input file holds, it is that line's result or error: the other lines have their rows."""

from __future__ import annotations

import json
import math
import os

import pytest
from fake_llm import FakeLLM
from hostile import BEAM_FIELDS, SAMPLING_FIELDS, cases, run_cases
from hypothesis import strategies as st
from toy import save_toy_checkpoint

from jaxpaged import LLM
from jaxpaged.batch import BatchContext, BatchRequest, InvalidLine, check_requests, error_row, parse_batch
from jaxpaged.batch.results import ResultStream
from jaxpaged.cli.main import main

CONTEXT = BatchContext(identity="model")
GOOD = b'{"id": "good", "prompt": "abc", "max_tokens": 2}'

json_texts = st.text(max_size=4) | st.sampled_from(["a", "\ud83d", "\0", "\n", "😀", "x" * 300, "nan"])
#: As JSON is written: numbers that Python cannot hold, words that JSON does not have.
raw_values = st.sampled_from(
    [
        "1" + "0" * 400, "1" * 5000, "1e400", "-1e400", "1e-400", "NaN", "Infinity", "-Infinity", "null", "true", "[]",
        "{}", "[[1]]", "2147483648", "-1", "0.5", '"\\ud83d"', '["\\ud83d"]', '{"5": 1, "5": 2}', '{"05": 1}',
        '{"5": NaN}', "[" * 2000 + "]" * 2000,
        '{"a":' * 2000 + "1" + "}" * 2000, "[1,", "01", "'a'", "[" + "1," * 3000 + "1]",
    ]
)  # fmt: skip
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | json_texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
).map(json.dumps)
PARAMETERS = sorted((set(SAMPLING_FIELDS) | set(BEAM_FIELDS)) - {"logits_processors"})
KEYS = [
    "id",
    "prompt",
    "prompt_token_ids",
    "custom_id",
    "method",
    "url",
    "body",
    "model",
    "echo",
    "stream",
    "add_special_tokens",
    "odd",
]
pairs = st.tuples(st.sampled_from([*PARAMETERS, *KEYS]), raw_values | json_values)


def object_of(start: str):
    """JSON text of an object that begins as a valid line does, with more keys, of which some are there twice."""
    more = st.lists(pairs, max_size=3)
    return more.map(lambda given: "{" + ", ".join([start, *(f'"{key}": {value}' for key, value in given)]) + "}")


plain = object_of('"prompt": "ab"') | object_of('"id": 7, "prompt_token_ids": [5]')
bodies = object_of('"prompt": ["a", [5]], "max_tokens": 2')
openai = bodies.map(lambda b: f'{{"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {b}}}')
lines = st.one_of(
    plain.map(lambda text: text.encode("utf-8", "surrogatepass")),
    openai.map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.binary(max_size=40),
    st.sampled_from([b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"[" * 200_000, b'{"a":' * 200_000, b'"text"', b"\r", b"\0"]),
).filter(lambda line: b"\n" not in line)  # fmt: skip


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = save_toy_checkpoint(tmp_path_factory.mktemp("toy"))
    return LLM(directory, page_size=4, num_pages=64, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64)


def strict(row: bytes) -> dict:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(row, parse_constant=refuse)


@cases(quick=300)
def test_every_line_is_a_request_or_an_error_of_its_own(llm, num_cases):
    reader, writer = os.pipe()
    stream = ResultStream(writer)

    def check(line):
        entries = parse_batch(b"\n".join([GOOD, line, GOOD]), CONTEXT, "jsonl")
        assert [e.index for e in entries] == [0, 1, 2] if line.strip() else [0, 2]
        requests = [e for e in entries if isinstance(e, BatchRequest)]
        accepted, refused = check_requests(llm, requests)
        assert {0, 2} <= {request.index for request in accepted}
        errors = [(e, e.reason) for e in entries if isinstance(e, InvalidLine)] + refused
        for entry, reason in errors:
            assert len(reason) < 2500
            stream.write(error_row(entry, reason))
            row = strict(os.read(reader, 1 << 16))
            assert row["index"] == 1 and row["error"]["message"].startswith("line 2: ")

    run_cases(num_cases, check, lines)
    os.close(reader)
    os.close(writer)


BAD_LINES = {
    '{"id": "x", "prompt": "b", "temperature": 1' + "0" * 400 + "}": "temperature must be",
    '{"id": "x", "prompt": "b", "bad_words": ["\\ud83d"]}': "bad_words has a character that is not Unicode text",
    '{"id": "x", "prompt": "b", "stop": "\\ud83d"}': "stop has a character that is not Unicode text",
    '{"id": "x", "prompt": "\\ud83d"}': "prompt has a character that is not Unicode text",
    '{"id": "x", "prompt": "b", "beam_width": 2147483648}': "exceed max_num_seqs=8",
    '{"id": "x", "prompt": "b", "n": 1000000000000}': "exceed max_num_seqs=8",
    '{"id": "x", "prompt": "b", "logprobs": 1000000000}': "exceeds the vocabulary",
    '{"id": "x", "prompt": "b", "temperature": NaN}': "temperature must be a number",
    '{"id": "x", "prompt": "b", "logit_bias": {"5": Infinity}}': "logit_bias[5] must be finite",
    '{"id": "x", "prompt": "b", "logit_bias": {"5": 1, "05": 2}}': "logit_bias token id must be an integer",
    '{"id": "x", "prompt": "b", "prompt": "c"}': "the key 'prompt' is there twice",
    '{"id": "x", "prompt": "b", "n": null}': "n must be an integer, got None",
    '{"id": "x", "prompt": "b", "seed": 18446744073709551616}': "seed must be at least 0 and below 2**64",
    '{"id": "x", "prompt": "b", "stop": [' + '"a",' * 20_000 + '"a"]}': "stop has 20001 strings",
}  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_and_keeps_its_id(llm, line):
    (entry,) = parse_batch(line.encode(), CONTEXT)
    if isinstance(entry, BatchRequest):
        ((refused, reason),) = check_requests(llm, [entry])[1]
        assert refused is entry and entry.id == "x"
    else:
        reason = entry.reason
        assert entry.id == "x"
    assert BAD_LINES[line] in reason


def test_a_file_of_bad_lines_has_a_row_for_each_and_the_results_of_the_good_ones(tmp_path, capfd):
    (tmp_path / "model").mkdir()
    bad = [line.encode() for line in BAD_LINES if "exceed" not in BAD_LINES[line]]  # the stand-in takes any number
    bad += [b'{"prompt": "\xff"}', b"[" * 200_000, b'{"id": ' + b"9" * 5000 + b', "prompt": "b"}', b"\xef\xbb\xbf{}"]
    content = b"\r\n".join([GOOD, *bad, b" \t", GOOD])
    (tmp_path / "in.jsonl").write_bytes(content)
    arguments = ["generate", str(tmp_path / "model"), "--input", str(tmp_path / "in.jsonl")]
    assert main([*arguments, "--output", str(tmp_path / "out.jsonl")], make_llm=FakeLLM) == 1
    rows = {row["index"]: row for row in map(strict, (tmp_path / "out.jsonl").read_bytes().splitlines())}
    assert sorted(rows) == [*range(len(bad) + 1), len(bad) + 2]
    assert [i for i, row in sorted(rows.items()) if "outputs" in row] == [0, len(bad) + 2]
    _, failed = capfd.readouterr().err.splitlines()
    assert failed.startswith(f"jaxpaged: {len(bad)} of {len(bad) + 2} lines failed: 2, 3, 4, 5, 6, ...")


@pytest.mark.parametrize(
    "name, data, named",
    [
        ("q.csv", b"a\nprompt\n", "no column is called prompt"),
        ("q.TSV", b"a\nprompt\n", "no column is called prompt"),
        ("q.parquet", b"PAR1", "not a whole Parquet file"),
        ("q.arrow", b"ARROW1", ".arrow files are not read"),
        ("q.xlsx", b"PK\x03\x04", ".xlsx files are not read"),
        ("q", b"\x1f\x8b\x08", "the input is gzip"),
        ("q.txt", b"PAR1\x15\x04", "the input is Parquet"),
        ("q.tgz", b"\x1f\x8b", ".tgz files are not read"),
        ("q.docx", b"PK\x03\x04", ".docx files are not read"),
        ("q.tab", b"prompt\tid\n", ".tab files are not read"),
        ("q", b"%PDF-1.7\n", "the input is PDF"),
        ("q", "a prompt\n".encode("utf-16-le"), "the input has NUL bytes"),  # without a mark that says so
        ("q", b"ORC\n\x0b\x08\x00\x12", "the input has NUL bytes"),
        (
            "q.data",
            b"a\n",
            ".data files are not read; what is read: .jsonl, .ndjson, .json, .csv, .tsv",
        ),
    ],
)
def test_a_file_that_is_no_lines_is_refused_unless_it_is_said_to_be_text(name, data, named, tmp_path, capfd):
    (tmp_path / "model").mkdir()
    (tmp_path / name).write_bytes(data)
    arguments = [
        "generate",
        str(tmp_path / "model"),
        "--input",
        str(tmp_path / name),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(arguments, make_llm=FakeLLM) == 2
    message = capfd.readouterr().err
    assert named.rstrip(": ") in message and message.count("\n") == 1 and not (tmp_path / "out").exists()
    assert main([*arguments, "--format", "text"], make_llm=FakeLLM) in (0, 1)  # 1 where a line is not UTF-8


def test_what_archives_begin_with_in_part_begins_prompts_too():
    for line in (b"ORC: who goes there?", b"Rar! means rarely", b"{\0}"):
        assert len(parse_batch(line, CONTEXT)) == 1


def test_lines_of_a_jsonl_file_are_never_prompts(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "in.jsonl").write_text('oops\n{"prompt": "a", "max_tokens": 1}\n')
    arguments = ["generate", str(tmp_path / "model"), "--input", str(tmp_path / "in.jsonl")]
    assert main([*arguments, "--output", str(tmp_path / "out")], make_llm=FakeLLM) == 1
    rows = {row["index"]: row for row in map(strict, (tmp_path / "out").read_bytes().splitlines())}
    assert "not JSON" in rows[0]["error"]["message"] and rows[1]["prompt"] == "a"
    assert not math.isnan(rows[1]["outputs"][0]["token_ids"][0])
