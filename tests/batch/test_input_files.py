"""Files of prompts of every kind: what is read by which name, what is carried to the rows, and what can be wrong."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys

import pytest
from fake_llm import FakeLLM

from jaxpaged.batch import BatchContext, BatchRequest, InvalidLine, parse_batch
from jaxpaged.batch.gzip_input import unpack
from jaxpaged.batch.input_formats import InputFormat, format_of_name
from jaxpaged.cli.main import main

ROWS = [
    {"prompt": "eins", "label": 1, "source": "a"},
    {"prompt": "zwei, drei", "label": 2, "source": None},
    {"prompt": "vier\nfünf", "label": 3, "source": "b"},
]


def as_csv(rows, delimiter=","):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows, **options):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink, **options)
    return sink.getvalue().to_pybytes()


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def generate(tmp_path, monkeypatch):
    """Write a file of this name and run the command over it: exit code and rows by index."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    def run(name, data, *flags):
        (tmp_path / name).write_bytes(data)
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        arguments = ["generate", "model", "--input", name, "--output", "out.jsonl", "--max-tokens", "2", *flags]
        code = main(arguments, make_llm=FakeLLM)
        rows = (tmp_path / "out.jsonl").read_text().splitlines() if (tmp_path / "out.jsonl").exists() else []
        return code, {row["index"]: row for row in map(json.loads, rows)}

    return run


def parse(data, file_format, cut=None, **context):
    return parse_batch(data, BatchContext(**context), file_format, cut)


def reasons(entries):
    return [entry.reason if isinstance(entry, InvalidLine) else entry.prompts for entry in entries]


KINDS = {
    "in.jsonl": as_lines, "in.ndjson": as_lines, "in.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "lines.json": as_lines, "in.csv": as_csv, "in.TSV": lambda rows: as_csv(rows, "\t"), "in.parquet": as_parquet,
    "in.jsonl.gz": lambda rows: gzip.compress(as_lines(rows)), "in.csv.gz": lambda rows: gzip.compress(as_csv(rows)),
    "in.tsv.gz": lambda rows: gzip.compress(as_csv(rows, "\t")),
    "in.json.GZ": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "in.gz": lambda rows: gzip.compress(as_lines(rows)),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_every_kind_gives_the_same_prompts_and_carries_its_other_columns(generate, name):
    code, rows = generate(name, KINDS[name](ROWS))
    assert code == 0
    assert [rows[i]["prompt"] for i in range(3)] == [row["prompt"] for row in ROWS]
    is_text = "sv" in name.lower()
    assert [rows[i]["label"] for i in range(3)] == (["1", "2", "3"] if is_text else [1, 2, 3])
    assert rows[1]["source"] == ("" if is_text else None)


@pytest.mark.parametrize("name", ["in.txt", "in.txt.gz"])
def test_a_text_file_is_a_prompt_a_line(generate, name):
    data = gzip.compress(b"eins\nzwei\n") if name.endswith("gz") else b"eins\nzwei\n"
    code, rows = generate(name, data)
    assert (code, [rows[i]["prompt"] for i in range(2)]) == (0, ["eins", "zwei"])
    assert "{not json" in generate("in.txt", b"{not json\n")[1][0]["prompt"]


def test_a_text_file_of_json_lines_is_neither_read_as_text_nor_as_json_in_silence(generate, capfd):
    assert generate("in.txt", b'{"prompt": "a"}\n')[0] == 2
    assert "let the name end in .jsonl, or say --format jsonl, or --format text" in capfd.readouterr().err
    assert generate("in.txt", b'{"prompt": "a"}\n', "--format", "jsonl")[1][0]["prompt"] == "a"
    assert generate("in.txt", b'{"prompt": "a"}\n', "--format", "text")[1][0]["prompt"] == '{"prompt": "a"}'


def test_an_unknown_ending_is_refused_with_those_that_are_read():
    assert format_of_name("in", "auto") == format_of_name("-", "auto") == InputFormat("auto")
    assert format_of_name("a/b.c/in.CSV.gz", "auto") == InputFormat("csv", is_gzip=True)
    for name, words in (
        ("in.prompts", r"\.prompts files are not read; what is read: \.jsonl, \.ndjson, \.json, \.csv"),
        ("in.xlsx", r"\.xlsx files are not read: save it as \.csv; what is read"),
        ("in.csv.zip", r"\.zip files are not read: unpack it first"),
        ("in.parquet.gz", r"Parquet compresses itself"),
        ("in.docx.gz", r"\.docx files are not read"),
    ):
        with pytest.raises(ValueError, match=words):
            format_of_name(name, "auto")
    assert format_of_name("in.prompts", "tsv").name == "tsv"


def test_standard_input_may_be_a_table_if_that_is_said(generate, monkeypatch, tmp_path):
    class Stdin:
        buffer = io.BytesIO(as_csv(ROWS))

    monkeypatch.setattr(sys, "stdin", Stdin)
    arguments = ["generate", "model", "--input", "-", "--format", "csv", "--output", "piped.jsonl", "--max-tokens", "1"]
    assert main(arguments, make_llm=FakeLLM) == 0
    rows = [json.loads(line) for line in (tmp_path / "piped.jsonl").read_text().splitlines()]
    assert sorted(row["prompt"] for row in rows) == ["eins", "vier\nfünf", "zwei, drei"]


# Which column, and what is carried


def test_the_prompt_column_can_be_named_and_is_found_where_it_has_a_usual_name(generate):
    rows = [{"question": "q", "prompt": "p", "text": "t"}]
    assert (
        generate("in.csv", as_csv(rows), "--prompt-column", "question")[1][0] | {"text": "t", "input_prompt": "p"}
        == (generate("in.csv", as_csv(rows), "--prompt-column", "question")[1][0])
    )
    code, found = generate("in.csv", as_csv(rows), "--prompt-column", "question")
    assert code == 0 and {**found[0], "prompt": "q", "text": "t", "input_prompt": "p"} == found[0]
    assert generate("in.csv", as_csv(rows))[1][0]["prompt"] == "p"
    assert generate("in.parquet", as_parquet([{"text": "t", "a": 1}]))[1][0]["prompt"] == "t"
    assert generate("in.jsonl", as_lines([{"q": "x", "k": [1]}]), "--prompt-column", "q")[1][0]["k"] == [1]


def test_a_column_that_is_not_there_is_named_with_those_that_are(generate, capfd):
    for name, data in (("in.csv", as_csv(ROWS)), ("in.parquet", as_parquet(ROWS))):
        assert generate(name, data, "--prompt-column", "question") == (2, {})
        assert "there is no column 'question'; the columns are prompt, label, source" in capfd.readouterr().err
    assert generate("in.jsonl", as_lines(ROWS), "--prompt-column", "question") == (2, {})
    assert "there is no key 'question'; the first object has prompt, label, source" in capfd.readouterr().err
    assert generate("in.csv", b"a,b\n1,2\n") == (2, {})
    message = capfd.readouterr().err
    assert "no column is called prompt, prompt_token_ids, messages or text; the columns are a, b" in message
    assert "--prompt-column NAME" in message
    assert generate("in.csv", b"prompt;label\nx;1\n")[0] == 2
    assert "they seem to be separated by ';'" in capfd.readouterr().err
    assert generate("in.txt", b"a\n", "--prompt-column", "question")[0] == 2
    assert "lines of text have none" in capfd.readouterr().err


def test_carried_columns_never_take_the_place_of_ours(generate):
    ours = ["id", "index", "line", "outputs", "seed", "fingerprint", "settings", "error", "response"]
    row = {"prompt": "p", **{name: f"of {name}" for name in ours if name not in ("id", "seed")}, "input_index": "other"}
    for name, data in (("in.csv", as_csv([row])), ("in.jsonl", as_lines([row])), ("in.parquet", as_parquet([row]))):
        code, rows = generate(name, data)
        assert code == 0 and isinstance(rows[0]["outputs"], list) and rows[0]["index"] == 0
        assert rows[0]["input_outputs"] == "of outputs" and rows[0]["input_error"] == "of error"
        assert (rows[0]["input_index"], rows[0]["input_input_index"]) == ("other", "of index")
        assert generate(name, data)[0] == 0  # and an earlier run's row is not taken for an error


def test_columns_of_parameters_are_parameters_and_empty_cells_say_nothing(generate):
    data = b'prompt,n,temperature,stop,seed,ignore_eos,logit_bias,id\na,2,0.5,5,7,True,"{""5"": 1}",x\nb,,,,,,,\n'
    first, second = parse(data, "csv")
    assert isinstance(first, BatchRequest) and isinstance(second, BatchRequest)
    params = first.params[0]
    assert (params.n, params.temperature, params.stop, params.seed) == (2, 0.5, "5", 7)
    assert (params.ignore_eos, params.logit_bias, first.id) == (True, {5: 1}, "x")
    assert (second.params[0].n, second.params[0].temperature, second.carried) == (1, 1.0, {})
    rows = [{"prompt": "a", "n": 2.0, "temperature": 0.5}, {"prompt": "b", "n": None, "temperature": float("nan")}]
    first, second = parse(as_parquet(rows), "parquet")
    assert (first.params[0].n, second.params[0].n, second.params[0].temperature) == (2, 1, 1.0)


def test_a_misspelt_parameter_is_refused_and_any_other_key_is_carried():
    for key, meant in (("temprature", "temperature"), ("max_new_tokens", "max_tokens"), ("topP", "top_p")):
        (entry,) = parse(as_lines([{"prompt": "a", key: 1}]), "jsonl")
        assert entry.reason.startswith(f"unknown key '{key}'; did you mean {meant}?")
        with pytest.raises(ValueError, match=f"did you mean {meant}"):
            parse(as_csv([{"prompt": "a", key: 1}]), "csv")
    keys = ["model", "url", "message", "tokens", "score", "seeds", "idx", "answer", "document", "stop_words"]
    (entry,) = parse(as_lines([{"prompt": "a", **dict.fromkeys(keys, 1)}]), "jsonl")
    assert entry.carried == dict.fromkeys(keys, 1)


def test_conversations_and_token_ids_come_from_tables_too(generate):
    messages = [{"role": "user", "content": "hi"}]
    for data, kind in (
        (as_csv([{"messages": json.dumps(messages), "x": "1"}]), "csv"),
        (as_parquet([{"messages": messages, "x": "1"}]), "parquet"),
        (as_parquet([{"prompt": messages, "x": "1"}]), "parquet"),
        (json.dumps([{"messages": messages, "x": "1"}]).encode(), "json"),
    ):
        (entry,) = parse(data, kind)
        assert (entry.prompts, entry.carried) == ([{"messages": messages}], {"x": "1"})
    data = as_csv([{"prompt": "a", "messages": ""}, {"prompt": "", "messages": json.dumps(messages)}])
    assert reasons(parse(data, "csv")) == [["a"], [{"messages": messages}]]
    found = reasons(parse(as_parquet([{"prompt": b"as bytes"}, {"prompt": b"\xff"}]), "parquet"))
    assert found[0] == ["as bytes"] and "not UTF-8: byte 0xff" in found[1]
    assert reasons(parse(b'prompt_token_ids\n"[1, 2]"\n[1\n', "csv")) == [
        [[1, 2]], "prompt_token_ids must be a list of token ids, got '[1'",
    ]  # fmt: skip
    assert reasons(parse(b'["a", [5, 6], {"prompt": "b"}, 7]', "json")) == [
        ["a"], [[5, 6]], ["b"], "a row is an object, a text or a list of token ids, got 7",
    ]  # fmt: skip
    body = {"prompt": "a", "max_tokens": 1}
    row = {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": json.dumps(body)}
    (entry,) = parse(as_csv([row]), "csv")
    assert entry.is_openai and entry.prompts == ["a"]


def test_values_that_json_does_not_have_are_carried_as_text(generate):
    import datetime
    import decimal

    row = {
        "prompt": "a", "day": datetime.date(2024, 5, 6), "price": decimal.Decimal("1.50"), "raw": b"\xff", "x": 1e400,
        "when": datetime.datetime(2024, 5, 6, 7, 8), "deep": {"a": [float("nan")], "b": b"b"},
    }  # fmt: skip
    code, rows = generate("in.parquet", as_parquet([row]))
    assert code == 0
    expected = {"day": "2024-05-06", "price": "1.50", "raw": "/w==", "x": None, "when": "2024-05-06T07:08:00"}
    assert {**rows[0], **expected, "deep": {"a": [None], "b": "Yg=="}} == rows[0]


def test_a_carried_value_that_changes_is_a_change_of_the_line(generate, tmp_path, capfd):
    code, rows = generate("in.csv", as_csv(ROWS))
    (tmp_path / "in.csv").write_bytes(as_csv([{**ROWS[0], "label": 9}, *ROWS[1:]]))
    assert main(["generate", "model", "--input", "in.csv", "--output", "out.jsonl", "--max-tokens", "2"]) == 2
    assert 'column label was "1", is "9"' in capfd.readouterr().err


# What is wrong


def test_a_bad_row_is_its_own_error_and_names_its_row(generate):
    data = b'prompt,label\na,1\nb\nc,3,4\n"d"e,5\n\xff,6\n\nf,7\n"g\nh,8\n'
    code, rows = generate("in.csv", data)
    assert code == 1
    assert {i: row["prompt"] for i, row in rows.items() if "outputs" in row} == {0: "a", 5: "f"}
    assert rows[1]["error"]["message"] == "row 2: 1 cells, and there are 2 columns: prompt, label"
    assert rows[2]["error"]["message"] == "row 3: 3 cells, and there are 2 columns: prompt, label"
    assert "row 4: ',' expected after" in rows[3]["error"]["message"] and "(line 5 of the file)" in str(rows[3])
    assert rows[4]["error"]["message"] == "row 5: not UTF-8: byte 0xff at column 1 of 'prompt'"
    assert "row 7: unexpected end of data: a quote is opened and never closed (line 9" in rows[6]["error"]["message"]
    assert rows[4]["label"] == "6"  # an error carries what it can


def test_tables_as_a_whole_are_refused_in_words():
    for data, kind, words in (
        (b"prompt,prompt\na,b\n", "csv", "two columns are called 'prompt'"),
        ("prompt\na\n".encode("utf-16"), "csv", "UTF-16"),
        (b"pr\xffompt\na\n", "csv", "names of its columns are not UTF-8"),
        (b'"prompt\na\n', "csv", "names of its columns cannot be read"),
        (b"PK\x03\x04prompt\n", InputFormat("csv"), "the input is zip"),
        (b"no parquet", "parquet", "not a whole Parquet file, since its end is missing or damaged"),
        (as_parquet(ROWS)[:-9], "parquet", "not a whole Parquet file"),
    ):
        with pytest.raises(ValueError, match=words):
            parse(data, kind)
    assert parse(b"", "csv") == parse(b"prompt\n", "csv") == parse(b"", "json") == parse(b"[ ]", "json") == []


def test_parquet_with_damaged_rows_keeps_those_before(generate):
    data = bytearray(as_parquet([{"prompt": f"{i} abc"} for i in range(9)], row_group_size=3, use_dictionary=False))
    column = pytest.importorskip("pyarrow.parquet").ParquetFile(io.BytesIO(data)).metadata.row_group(1).column(0)
    data[column.data_page_offset : column.data_page_offset + 20] = bytes(20)
    code, found = generate("in.parquet", bytes(data))
    assert code == 1 and sorted(found) == [0, 1, 2, 3]
    assert [found[i]["prompt"] for i in range(3)] == ["0 abc", "1 abc", "2 abc"]
    assert "row 4: the Parquet data is damaged" in found[3]["error"]["message"]


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.csv.gz", "in.json.gz", "in.txt.gz"])
def test_gzip_that_ends_early_keeps_the_rows_before_and_is_an_error(generate, name):
    import random

    letters = random.Random(0)
    rows = [{"prompt": "".join(letters.choices("abcdefgh ", k=50)), "x": i} for i in range(500)]
    make = {"l": as_lines, "v": as_csv, "n": lambda rows: json.dumps(rows).encode()}.get(
        name.split(".")[1][-1], lambda rows: "\n".join(row["prompt"] for row in rows).encode()
    )
    whole = gzip.compress(make(rows))
    code, found = generate(name, whole[: len(whole) // 2])
    assert code == 1
    done = sorted(i for i, row in found.items() if "outputs" in row)
    assert 100 < len(done) < 400 and done == list(range(len(done)))
    assert [found[i]["prompt"] for i in done] == [row["prompt"] for row in rows[: len(done)]]
    assert set(found) == {*done, len(done)}
    assert "the gzip data ends early" in found[len(done)]["error"]["message"]


def test_gzip_with_a_wrong_checksum_or_none_of_its_marks(generate, capfd):
    damaged = bytearray(gzip.compress(b"a\nb\n"))
    damaged[-6] ^= 1
    code, rows = generate("in.txt.gz", bytes(damaged))
    assert code == 1 and [rows[i]["prompt"] for i in range(2)] == ["a", "b"]
    assert "the gzip data is damaged (CRC check failed" in rows[2]["error"]["message"]
    capfd.readouterr()
    assert generate("in.txt.gz", b"a\n")[0] == 2
    assert "the file is not gzip's" in capfd.readouterr().err
    assert unpack(b"") == (b"", None)


def test_a_file_that_is_mended_goes_on_from_what_was_there(generate, tmp_path):
    whole = gzip.compress(as_lines(ROWS))
    generate("in.jsonl.gz", whole[:-12])
    before = (tmp_path / "out.jsonl").read_text()
    (tmp_path / "in.jsonl.gz").write_bytes(whole)
    arguments = ["generate", "model", "--input", "in.jsonl.gz", "--output", "out.jsonl", "--max-tokens", "2"]
    assert main(arguments, make_llm=FakeLLM) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(row["index"] for row in rows) == [0, 1, 2] and "gzip" in before


def test_a_list_that_breaks_off_keeps_what_comes_before():
    for text, words in (
        (b'[{"prompt": "a"}, {"prompt": "b"', "the file is no JSON from here on"),
        (b'[{"prompt": "a"} {"prompt": "b"}]', "neither a comma nor the list's end at line 1, column 18"),
        (b'[{"prompt": "a"}] tail', "the file goes on behind its end"),
        (b'[{"prompt": "a"}, 5', "a number that ends with the file"),
        (b'[{"prompt": "a"}, ' + b"[" * 100_000, "the file is no JSON from here on"),
    ):
        found = reasons(parse(text, "json"))
        assert found[0] == ["a"] and len(found) == 2 and words in found[1]
    twice, bad, good = parse(b'[{"prompt": "a", "prompt": "b"}, {"prompt": "\xff"}, {"prompt": "c"}]', "json")
    assert "is there twice" in twice.reason and "not UTF-8: byte 0xff" in bad.reason and good.prompts == ["c"]
    long, good = parse(b'[{"prompt": "a", "x": ' + b"9" * 5000 + b'}, {"prompt": "b"}]', "json")
    assert "an integer of 5000 digits" in long.reason and good.prompts == ["b"]
    assert reasons(parse(b'{"prompt":\n"a"}', "json")) == [["a"]]
    assert reasons(parse(b'{"prompt": "a"}\n{"prompt": 5}\n', "json"))[0] == ["a"]


def test_what_parquet_needs_is_named_where_it_is_missing(generate, capfd, monkeypatch):
    data = as_parquet(ROWS)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert generate("in.parquet", data)[0] == 2
    assert "a .parquet file needs pyarrow, which is not installed: pip install 'jaxpaged[parquet]'" in (
        capfd.readouterr().err
    )
    assert generate("in.jsonl", as_lines(ROWS), "--output", "out.parquet")[0] == 2
    assert "a .parquet output needs pyarrow" in capfd.readouterr().err


def test_a_cell_may_be_long():
    (entry,) = parse(b"prompt\n" + b"x" * 300_000 + b"\n", "csv")
    assert len(entry.prompts[0]) == 300_000 and csv.field_size_limit() == 131_072
