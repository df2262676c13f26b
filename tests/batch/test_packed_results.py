"""Outputs that are made when a run is over, Parquet and gzip, keep every promise of a file of JSON lines."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_llm import FakeLLM
from paths import ROOT

from jaxpaged.batch.parquet_rows import pack_parquet, unpack_parquet
from jaxpaged.cli.main import main

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

LINES = [
    '{"prompt": "eins", "id": "first", "max_tokens": 2, "label": 1, "tags": ["a"], "more": {"x": 1}}',
    '{"prompt": "zwei", "n": 2, "max_tokens": 2, "label": "two", "tags": [], "more": {"y": [null]}, "none": null}',
    "",
    '{"prompt": [104, 105], "logprobs": 0, "prompt_logprobs": 1, "max_tokens": 1, "label": 1.5, "half": "\\ud83d"}',
    '{"prompt": "x", "temprature": 1, "label": 3}',
    '{"custom_id": "äöü", "method": "POST", "url": "/v1/completions", "body": {"prompt": ["a", "b"], "max_tokens": 1}}',
    '{"prompt": "broken',
    '{"prompt": "' + "long" * 100 + '", "id": 7}',
    '{"prompt": "beams", "beam_width": 2, "max_tokens": 2}',
]
ORDER = [0, 1, 3, 4, 5, 6, 7, 8]
KINDS = ("parquet", "jsonl.gz")


class PackedBatch:
    """An input of lines, an output of either kind, and the command over them with a stand-in for the model."""

    def __init__(self, directory: Path, kind: str):
        self.directory = directory
        (directory / "model").mkdir()
        (directory / "model" / "config.json").write_text("{}")
        self.input, self.output = directory / "in.jsonl", directory / f"out.{kind}"
        self.journal = directory / f"out.{kind}.jsonl"
        self.write(LINES)
        self.llms: list[FakeLLM] = []

    def write(self, lines):
        self.input.write_text("\n".join(lines) + "\n")

    def arguments(self, *flags):
        names = ["--input", str(self.input), "--output", str(self.output)]
        return ["generate", str(self.directory / "model"), *names, *flags]

    def run(self, *flags) -> int:
        self.llms.clear()
        return main(self.arguments(*flags), make_llm=self._make_llm)

    def _make_llm(self, **options):
        self.llms.append(FakeLLM(**options))
        return self.llms[-1]

    @property
    def served(self) -> set[int]:
        return {int(request.split(".")[0]) for llm in self.llms for request in llm.served}

    @property
    def rows(self) -> list[dict]:
        if self.output.suffix == ".gz":
            return [json.loads(line) for line in gzip.open(self.output)]
        return parquet.read_table(self.output).to_pylist()

    @property
    def files(self) -> list[str]:
        return sorted(file.name for file in self.directory.iterdir() if file.name.removeprefix(".").startswith("out"))


@pytest.fixture(params=KINDS)
def batch(tmp_path, request):
    return PackedBatch(tmp_path, request.param)


@pytest.fixture
def table(tmp_path):
    return PackedBatch(tmp_path, "parquet")


def test_a_finished_run_leaves_the_file_alone_with_its_rows_in_the_order_of_the_input(batch):
    assert batch.run() == 1
    assert batch.files == [batch.output.name]
    assert [row["index"] for row in batch.rows] == ORDER


def test_a_table_has_a_column_a_key_with_types_of_its_own(table):
    table.run()
    first, second, third, misspelt, openai, _, refused, beams = table.rows
    assert (first["id"], first["prompt"], first["num_prompt_tokens"]) == ("first", "eins", 4)
    assert first["outputs"][0]["text"] and second["outputs"][1]["token_ids"]
    assert third["outputs"][0]["logprobs"][0][0]["rank"] == 2 and len(third["prompt_logprobs"]) == 2
    assert beams["outputs"][0]["score"] == -0.25 and first["outputs"][0]["score"] is None
    assert "did you mean temperature" in misspelt["error"]["message"] and refused["id"] == "7"
    assert json.loads(openai["response"])["body"]["choices"][0]["text"] and openai["custom_id"] == "äöü"
    assert (first["tags"], second["tags"], third["tags"]) == (["a"], [], None)
    assert (first["label"], second["label"], third["label"]) == ("1", '"two"', "1.5")  # JSON, where types differ
    assert (first["more"], second["more"], third["half"]) == ('{"x": 1}', '{"y": [null]}', "�")
    assert pyarrow.types.is_uint64(parquet.read_schema(table.output).field("seed").type)


def test_a_table_that_is_read_again_gives_the_rows_of_which_it_is_made(table, tmp_path):
    table.run()
    before = parquet.read_table(table.output)
    rows = list(unpack_parquet(table.output))
    with (tmp_path / "again.parquet").open("wb") as file:
        pack_parquet(lambda: iter(rows), file)
    again = parquet.read_table(tmp_path / "again.parquet")
    assert again.equals(before) and again.schema.equals(before.schema, check_metadata=True)


def test_a_finished_run_is_known_again_and_the_file_not_touched(batch, capsys):
    batch.run()
    before, when = batch.output.read_bytes(), batch.output.stat().st_mtime_ns
    capsys.readouterr()
    assert batch.run() == 1 and batch.llms == []
    assert (batch.output.read_bytes(), batch.output.stat().st_mtime_ns) == (before, when)
    assert batch.files == [batch.output.name]
    assert "has 8 of 8 lines already" in capsys.readouterr().err


def test_lines_that_are_added_or_mended_run_alone_and_join_the_others(batch):
    batch.run()
    before = {row["index"]: row for row in batch.rows}
    batch.write([*LINES[:4], '{"prompt": "x", "temperature": 1, "label": 3}', *LINES[5:], '{"prompt": "new"}'])
    assert batch.run() == 1 and batch.served == {4, 9}
    after = {row["index"]: row for row in batch.rows}
    assert [*after] == [*ORDER, 9] and after[4]["outputs"] and batch.files == [batch.output.name]
    assert all(after[i] == before[i] for i in ORDER if i != 4)


def test_results_of_another_run_are_refused_and_left_alone(batch, capsys):
    batch.run()
    before = batch.output.read_bytes()
    assert batch.run("--temperature", "0.5") == 2
    message = capsys.readouterr().err
    assert "temperature was the default, is 0.5" in message and "say --overwrite" in message
    assert (batch.output.read_bytes(), batch.files) == (before, [batch.output.name])
    assert batch.run("--overwrite", "--temperature", "0.5") == 1
    assert batch.output.read_bytes() != before and len(batch.rows) == len(ORDER)


def test_a_file_that_is_not_ours_is_refused_and_left_alone(batch, capsys):
    parquet.write_table(pyarrow.table({"a": [1]}), batch.directory / "other")
    contents = [b"", b"notes", (batch.directory / "other").read_bytes(), gzip.compress(b"notes\n")]
    batch.run()
    for content in [*contents, batch.output.read_bytes()[:-10]]:
        batch.output.write_bytes(content)
        if content == b"" and batch.output.suffix == ".gz":
            continue  # an empty file is an empty gzip file
        capsys.readouterr()
        assert batch.run() == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "say --overwrite" in message
        assert (batch.output.read_bytes(), batch.files) == (content, [batch.output.name])
    assert batch.run("--overwrite") == 1 and len(batch.rows) == len(ORDER)


def start(batch, delay):
    environment = {**os.environ, "FAKE_DELAY": str(delay), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(ROOT / "tests" / "fake_llm.py"), *batch.arguments()]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_rows(batch, process, count):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if batch.journal.exists() and batch.journal.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.005)
    raise AssertionError(f"no {count} rows; exit code {process.poll()}, {process.stderr.read()}")


def test_kill_minus_nine_again_and_again_loses_and_doubles_nothing(table):
    table.write(LINES[:3] + [f'{{"prompt": "prompt {i}", "n": 2, "k": {i}}}' for i in range(20)])
    assert table.run() == 0
    undisturbed = parquet.read_table(table.output)
    table.output.unlink()
    rows = 0
    for count in (1, 12):
        process = start(table, delay=0.02)
        wait_for_rows(table, process, count)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stderr.close()
        assert not table.output.exists()
        rows, before = table.journal.read_bytes().count(b"\n"), rows
        assert rows > before  # what was there has stayed
    assert table.run() == 0
    assert len(table.served) == 22 - rows
    assert parquet.read_table(table.output).equals(undisturbed)


@pytest.mark.parametrize("at", ["pack", "replace", "unlink"])
def test_a_kill_while_the_file_is_made_loses_nothing(batch, at, monkeypatch):
    batch.run()
    whole = batch.output.read_bytes()
    batch.output.unlink()

    class Killed(BaseException):
        pass

    def kill(*_args, **_options):
        raise Killed

    real_replace = os.replace
    where = {"pack": (os, "fsync"), "replace": (os, "replace"), "unlink": (Path, "unlink")}[at]
    with monkeypatch.context() as patch:
        if at == "unlink":  # of the journal, when the file is in its place
            patch.setattr(os, "replace", lambda a, b: (real_replace(a, b), patch.setattr(*where, kill)))
        else:
            patch.setattr(*where, kill)
        with pytest.raises(Killed):
            batch.run()
    assert batch.journal.exists() and batch.output.exists() == (at == "unlink")
    (batch.directory / f".{batch.output.name}.partial").write_text("what a killed run has of the file")
    assert batch.run() == 1 and batch.llms == []
    assert (batch.output.read_bytes(), batch.files) == (whole, [batch.output.name])


def test_a_journal_that_is_being_written_keeps_others_out(batch, capsys):
    import fcntl

    batch.run()
    before = batch.output.read_bytes()
    with batch.journal.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for flags in ([], ["--overwrite"]):
            assert batch.run(*flags) == 2
            assert "is being written by another run" in capsys.readouterr().err
    assert batch.output.read_bytes() == before


def test_an_output_stays_a_link_with_its_mode_and_an_empty_input_is_an_empty_table(batch):
    real = batch.directory / "real"
    batch.output.symlink_to(real)
    batch.run()
    real.chmod(0o600)
    batch.run("--num-pages", "1000")
    assert batch.output.is_symlink() and real.stat().st_mode & 0o777 == 0o600
    batch.output.unlink()
    batch.write([])
    assert batch.run() == 0 and batch.rows == []


def test_neither_file_nor_journal_may_be_the_input(batch, capsys):
    batch.journal.write_text('{"prompt": "a"}\n')
    batch.input = batch.journal
    for flags in ([], ["--overwrite"]):
        assert batch.run(*flags) == 2
        assert "is also the input" in capsys.readouterr().err
    assert batch.journal.read_text() == '{"prompt": "a"}\n'


def test_names_that_promise_another_file_are_refused(batch, capsys):
    for name in ("out.csv", "out.txt.gz", "out.xlsx", "out.parquet.gz"):
        batch.output = batch.directory / name
        assert batch.run() == 2
        assert "files are not written: rows are JSON lines" in capsys.readouterr().err
    batch.output = batch.directory / "out.json"
    assert batch.run() == 1


def test_a_disk_that_is_full_when_the_file_is_made_leaves_the_journal(table, monkeypatch, capsys):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_space)
        assert table.run() == 1
    assert "cannot write the output: No space left on device; mend that" in capsys.readouterr().err
    assert table.journal.exists() and not table.output.exists()
    assert table.run() == 1 and table.llms == [] and len(table.rows) == len(ORDER)


def test_numbers_that_no_column_holds_and_columns_of_many_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxpaged.batch.parquet_rows.CHUNK_ROWS", 2)
    values = {
        "big": [1, 2**70, None], "mixed": [1, 2, 0.5], "lists": [[], [1], [None]], "late": [None, None, "x"],
        "nothing": [None] * 3, "deep": [[[[]]], [[[1]]], None], "odd": [True, 1, None],
    }  # fmt: skip
    rows = [
        json.dumps({"id": str(i), "index": i, "fingerprint": "f", **{k: v[i] for k, v in values.items()}}).encode()
        for i in range(3)
    ]
    with (tmp_path / "t.parquet").open("wb") as file:
        pack_parquet(lambda: iter(rows), file)
    found = parquet.read_table(tmp_path / "t.parquet").to_pydict()
    assert found["big"] == ["1", str(2**70), None] and found["odd"] == ["true", "1", None]
    assert found["mixed"] == [1.0, 2.0, 0.5] and found["lists"] == [[], [1], [None]]
    assert found["late"] == [None, None, "x"] and found["nothing"] == [None] * 3
    assert found["deep"] == [[[[]]], [[[1]]], None]
    again = [json.loads(row) for row in unpack_parquet(tmp_path / "t.parquet")]
    assert [row["big"] for row in again] == values["big"] and [row["odd"] for row in again] == values["odd"]
