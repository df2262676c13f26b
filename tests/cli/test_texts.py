"""`--text` prints what was generated and nothing else, in the order of the input; with `-q` nobody says more."""

from __future__ import annotations

import json
import sys

import pytest
from fake_llm import FakeLLM

from jaxpaged.cli.main import main


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    lines = [
        {"prompt": "eins"}, {"prompt": "zwei", "n": 2}, {"prompt": 5}, {"prompt": "x" * 300}, {"prompt": "drei"},
        {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"prompt": ["a", "b"], "max_tokens": 2}},
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def generate(*flags, make_llm=FakeLLM):
        return main(["generate", "model", *flags, "--max-tokens", "3"], make_llm=make_llm)

    return generate


def texts(rows):
    found = []
    for row in sorted(rows, key=lambda row: row["index"]):
        found += [sample["text"] for sample in row.get("outputs", [])]
        found += [choice["text"] for choice in (row.get("response") or {"body": {"choices": []}})["body"]["choices"]]
    return found


def test_texts_come_in_the_order_of_the_input_with_errors_beside_them(run, tmp_path, capfd):
    assert run("--input", "in.jsonl", "--output", "rows.jsonl", "-q") == 1
    expected = texts(map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines()))
    assert len(expected) == 6
    capfd.readouterr()
    assert run("--input", "in.jsonl", "--text", "-q") == 1
    printed = capfd.readouterr()
    assert printed.out == "".join(f"{text}\n" for text in expected)
    lines = printed.err.splitlines()
    assert lines[0] == "jaxpaged: line 3: prompt must be a string or a list of token ids, got 5"
    assert lines[1].startswith("jaxpaged: line 4: prompt of 300 tokens") and "the reasons are above" in lines[2]


def test_texts_and_rows_can_both_be_had_and_those_of_before_are_not_printed_again(run, tmp_path, capfd):
    assert run("--input", "in.jsonl", "--output", "rows.jsonl", "--text") == 1
    expected = texts(map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines()))
    printed = capfd.readouterr()
    assert printed.out == "".join(f"{text}\n" for text in expected) and "2 of 6 lines failed" in printed.err
    assert run("--input", "in.jsonl", "--output", "rows.jsonl", "--text") == 1
    printed = capfd.readouterr()
    assert printed.out == "" and "has 6 of 6 lines already" in printed.err


def test_a_prompt_on_a_terminal_is_answered_by_its_text_alone(run, capfd, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert run("--prompt", "a", "--text") == 0
    (text,) = capfd.readouterr().out.split("\n")[:-1]
    assert len(text) == 3 and not text.startswith(">")


def test_quiet_says_nothing_but_what_is_wrong(run, tmp_path, capfd):
    (tmp_path / "in.txt").write_text("a\n")
    assert run("--input", "in.txt", "--output", "o.jsonl", "-q") == 0
    assert run("--input", "in.txt", "--output", "o.jsonl", "--quiet", "--account", "a.csv") == 0
    (tmp_path / "in.txt").write_text("")
    assert run("--input", "in.txt", "--output", "other.jsonl", "-q") == 0
    assert capfd.readouterr() == ("", "")
    assert run("--input", "in.jsonl", "--output", "p.jsonl", "-q") == 1
    assert "2 of 6 lines failed" in capfd.readouterr().err


def test_flags_that_contradict_these_are_refused(run, capfd):
    class NoTokenizer(FakeLLM):
        def __init__(self, **options):
            super().__init__(**options)
            self.tokenizer = None

    for flags, words in (
        (("--text", "--no-detokenize"), "--no-detokenize leaves them empty"),
        (("--prompt-column", "x"), "--prompt-column is for a file of --input"),
        (("-q", "-v"), "--quiet and --verbose contradict each other"),
    ):
        assert run("--prompt", "a", *flags) == 2
        assert words in capfd.readouterr().err
    assert run("--prompt", "a", "--text", make_llm=NoTokenizer) == 2
    assert "the model has no tokenizer: name one with --tokenizer" in capfd.readouterr().err
