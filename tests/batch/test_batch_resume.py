"""A batch run that is stopped anywhere goes on: nothing is lost, doubled or run again; foreign files are left alone."""

import fcntl
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

from jaxpaged.cli.main import main

FAKE_COMMAND = [sys.executable, str(ROOT / "tests" / "fake_llm.py")]

#: Every kind of line: text ids and umlauts, token ids, several samples, an OpenAI line, two invalid ones, one too long.
LINES = [
    '{"prompt": "eins", "id": "first", "max_tokens": 2}',
    '{"prompt": "zwei", "n": 2, "max_tokens": 2}',
    "",
    '{"prompt": [104, 105], "logprobs": 0, "max_tokens": 1}',
    '{"prompt": "x", "temprature": 1}',
    '{"custom_id": "äöü", "method": "POST", "url": "/v1/completions", "body": {"prompt": ["a", "b"], "max_tokens": 1}}',
    '{"prompt": "broken',
    '{"prompt": "' + "long" * 100 + '"}',
    '{"prompt": "last", "temperature": 0, "max_tokens": 2}',
]
NUM_ROWS = len(LINES) - 1


class Batch:
    """An input file, an output file, and the command over them with a fake model."""

    def __init__(self, directory: Path):
        self.model = directory / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text("{}")
        self.input, self.output = directory / "in.jsonl", directory / "out.jsonl"
        self.write(LINES)
        self.llms: list[FakeLLM] = []

    def write(self, lines):
        self.input.write_text("\n".join(lines) + "\n")

    def arguments(self, *flags):
        return ["generate", str(self.model), "--input", str(self.input), "--output", str(self.output), *flags]

    def run(self, *flags) -> int:
        return main(self.arguments(*flags), make_llm=self._make_llm)

    def _make_llm(self, **options):
        self.llms.append(FakeLLM(**options))
        return self.llms[-1]

    @property
    def rows(self) -> list[bytes]:
        return self.output.read_bytes().splitlines(keepends=True)

    @property
    def by_index(self) -> dict[int, dict]:
        return {row["index"]: row for row in map(json.loads, self.rows)}


@pytest.fixture
def batch(tmp_path):
    return Batch(tmp_path)


@pytest.mark.slow
def test_a_run_cut_off_at_any_byte_is_completed_to_the_same_rows(batch, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a few milliseconds, two thousand times
    assert batch.run() == 1
    whole = batch.output.read_bytes()
    rows = sorted(batch.rows)
    assert len(rows) == NUM_ROWS
    for length in range(len(whole) + 1):
        batch.output.write_bytes(whole[:length])
        batch.llms.clear()
        assert batch.run() == 1
        assert sorted(batch.rows) == rows
        kept = whole[:length].count(b"\n")
        assert batch.output.read_bytes().startswith(b"".join(whole.splitlines(keepends=True)[:kept]))
        served = [request for llm in batch.llms for request in llm.served]
        finished = {json.loads(row)["index"] for row in whole[:length].splitlines(keepends=True) if row.endswith(b"\n")}
        assert finished.isdisjoint(int(request.split(".")[0]) for request in served)


def test_a_finished_run_needs_no_model_and_says_again_what_failed(batch, capsys):
    batch.run()
    rows, first = batch.rows, capsys.readouterr().err
    batch.llms.clear()
    assert batch.run() == 1
    assert (batch.rows, batch.llms) == (rows, [])
    assert "3 of 8 lines failed: 5, 7, 8; the reasons are in" in first
    assert first.splitlines()[-1] == capsys.readouterr().err.splitlines()[-1]


def test_zeros_that_a_power_cut_leaves_behind_are_dropped(batch):
    batch.run()
    rows = batch.rows
    for tail in (b"\0" * 100, rows[-1][:10] + b"\0" * 100):
        batch.output.write_bytes(b"".join(rows[:-1]) + tail)
        assert batch.run() == 1
        assert sorted(batch.rows) == sorted(rows)


def test_a_mended_line_is_tried_again_and_its_error_goes(batch):
    batch.run()
    before = batch.by_index
    batch.write([*LINES[:4], '{"prompt": "x", "temperature": 1}', *LINES[5:]])
    batch.llms.clear()
    assert batch.run() == 1
    after = batch.by_index
    assert len(batch.rows) == NUM_ROWS
    assert "error" in before[4] and "outputs" in after[4]
    assert {i: row for i, row in before.items() if i != 4} == {i: row for i, row in after.items() if i != 4}
    assert [request for llm in batch.llms for request in llm.served] == ["4.0"]
    assert list(batch.output.parent.glob(".*")) == []


def test_a_refused_request_is_tried_again_when_an_option_changed(batch):
    batch.run()
    assert "400 tokens; 1 to 199 are possible" in batch.by_index[7]["error"]["message"]
    assert batch.run("--num-pages", "1000") == 1
    assert "outputs" in batch.by_index[7] and len(batch.rows) == NUM_ROWS


def test_dropping_stale_errors_keeps_a_link_a_link_and_the_files_mode(batch, tmp_path):
    real = tmp_path / "real.jsonl"
    batch.output.symlink_to(real)
    batch.run()
    real.chmod(0o600)
    batch.run("--num-pages", "1000")
    assert batch.output.is_symlink() and real.stat().st_mode & 0o777 == 0o600


def test_lines_may_be_added_to_a_finished_input(batch):
    batch.run()
    rows = batch.rows
    batch.write([*LINES, '{"prompt": "new"}'])
    assert batch.run() == 1
    assert batch.rows[:-1] == rows and batch.by_index[9]["prompt"] == "new"


@pytest.mark.parametrize("change", ["parameters", "seed", "prompt", "model", "fewer lines", "doubled row"])
def test_results_of_another_run_are_refused_and_left_alone(batch, change, capsys):
    batch.run()
    flags = []
    if change == "parameters":
        flags = ["--temperature", "0.5"]
    elif change == "seed":
        flags = ["--seed", "1"]
    elif change == "prompt":
        batch.write(['{"prompt": "other", "id": "first", "max_tokens": 2}', *LINES[1:]])
    elif change == "model":
        (batch.model / "config.json").write_text('{"other": 1}')
    elif change == "fewer lines":
        batch.write(LINES[:3])
    else:
        batch.output.write_bytes(batch.output.read_bytes() + batch.rows[-1])
    before = batch.output.read_bytes()
    capsys.readouterr()
    assert batch.run(*flags) == 2
    assert batch.output.read_bytes() == before
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "choose another output, or say --overwrite" in message
    assert batch.run("--overwrite", *flags) in (0, 1)


@pytest.mark.parametrize(
    "flags, line, words",
    [
        (["--temperature", "0.5"], LINES[0], "temperature was the default, is 0.5"),
        (["--dtype", "float16"], LINES[0], '--dtype was the default, is "float16"'),
        (["--seed", "7"], LINES[0], "--seed was 0, is 7"),
        (["--shared-prefix", "To all: "], LINES[0], '--shared-prefix was the default, is "To all: "'),
        (["model"], LINES[0], "the model (a digest of its files) was "),
        ([], '{"prompt": "eins", "id": "first", "max_tokens": 3}', "max_tokens was 2, is 3"),
        ([], '{"prompt": "eins", "id": "first"}', "max_tokens was 2, is the default"),
        ([], '{"prompt": "eins", "id": "first", "max_tokens": null}', "max_tokens was 2, is null"),
        ([], '{"prompt": "eins", "id": "first", "max_tokens": 2, "seed": 5}', ", is 5"),
        ([], '{"prompt": "eins", "id": "first", "max_tokens": 2, "beam_width": 2}', "beam_width was the default, is 2"),
        ([], '{"prompt": "eins", "id": 1, "max_tokens": 2}', 'id was "first", is 1'),
        ([], '{"prompt": "drei", "id": "first", "max_tokens": 2}', 'prompt was "eins", is "drei"'),
        ([], '{"prompt": "eins", "id": "first", "max_tokens": 0}', "the line is not valid now (max_tokens"),
        ([], "", "the input has no such line now"),
    ],
)
def test_what_has_changed_is_named_with_both_values(batch, flags, line, words, capsys):
    batch.run()
    rows = batch.rows
    batch.output.write_bytes(next(row for row in rows if b'"first"' in row))
    if flags == ["model"]:
        (batch.model / "config.json").write_text('{"other": 1}')
        flags = []
    batch.write([line, *LINES[1:]])
    capsys.readouterr()
    assert batch.run(*flags) == 2
    message = capsys.readouterr().err
    assert "line 1: the result of input line 1 does not stand: " in message and words in message


def test_what_has_changed_of_an_openai_line_is_named(batch, capsys):
    batch.run()
    before = batch.rows
    for old, new, words in (
        ('"max_tokens": 1', '"max_tokens": 1, "echo": true', "echo was the default, is true"),
        ('["a", "b"]', '["a", "c"]', "the line has another prompt now"),
        ("äöü", "aou", 'id was "äöü", is "aou"'),
        ('"max_tokens": 1', '"max_tokens": 1, "logit_bias": {"5": 2}', 'logit_bias was the default, is {"5": 2}'),
    ):
        batch.write([*LINES[:5], LINES[5].replace(old, new), *LINES[6:]])
        capsys.readouterr()
        assert batch.run() == 2
        message = capsys.readouterr().err
        assert "the result of input line 6 does not stand: " in message and words in message
    assert batch.rows == before


#: As version 0.1.0 wrote it for the first line of LINES: without its settings.
OLD_ROW = (
    b'{"id": "first", "index": 0, "prompt": "eins", "num_prompt_tokens": 4, "outputs": [{"index": 0, "text'
    b'": "jf", "token_ids": [106, 102], "finish_reason": "length", "stop_reason": null}], "seed": 21527286'
    b'9291430, "fingerprint": "1990184b71411d97"}\n'
)


def test_rows_of_version_0_1_0_stand(batch, capsys):
    batch.output.write_bytes(OLD_ROW)
    assert batch.run() == 1
    assert batch.rows[0] == OLD_ROW and len(batch.rows) == NUM_ROWS
    batch.output.write_bytes(OLD_ROW)
    capsys.readouterr()
    assert batch.run("--temperature", "0.5") == 2
    assert "rows of version 0.1.0" in capsys.readouterr().err


@pytest.mark.parametrize("planted", ["link", "file", "dangling link"])
def test_what_lies_where_rows_are_copied_is_removed_and_not_written_to(batch, tmp_path, planted):
    batch.run()
    victim, beside = tmp_path / "victim", tmp_path / ".out.jsonl.partial"
    if planted == "file":
        beside.write_text("of a run that was killed\n" * 1000)
    else:
        beside.symlink_to(victim)
    if planted == "link":
        victim.write_text("precious")
    assert batch.run("--num-pages", "1000") == 1  # a refused line is tried again, and its row goes
    assert len(batch.rows) == NUM_ROWS
    assert not beside.is_symlink() and not beside.exists()
    assert not victim.exists() if planted != "link" else victim.read_text() == "precious"


def test_an_account_that_nothing_was_run_for_is_not_passed_over_in_silence(batch, capsys):
    batch.write([LINES[0]])
    batch.run()
    assert batch.run("--account", str(batch.output.parent / "a.csv")) == 0
    assert "nothing is left to run, so no account is written" in capsys.readouterr().err


FOREIGN = [
    b"notes",
    b"notes\n",
    b'{"id": 1}',
    b'{"id": 1}\n',
    b'{"id": "a", "index": "0", "fingerprint": "b"}\n',
    b'{"id": "a", "index": 0, "fingerprint": 1}\n',
    b"\xff\n",
    b"[" * 100_000 + b"\n",
    b"\n",
]


@pytest.mark.parametrize("content", FOREIGN)
def test_a_file_that_is_not_ours_is_refused_and_left_alone(batch, content, capsys):
    batch.output.write_bytes(content)
    assert batch.run() == 2
    assert batch.output.read_bytes() == content
    assert "line 1: not a row that jaxpaged wrote" in capsys.readouterr().err
    assert batch.run("--overwrite") == 1
    assert len(batch.rows) == NUM_ROWS


def test_two_runs_cannot_write_one_file(batch, capsys):
    batch.run()
    before = batch.output.read_bytes()
    with batch.output.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for flags in ([], ["--overwrite"]):
            assert batch.run(*flags) == 2
            assert "is being written by another run" in capsys.readouterr().err
    assert batch.output.read_bytes() == before
    assert batch.run() == 1


def test_rows_reach_the_file_one_by_one(batch):
    written = []

    class Watched(FakeLLM):
        def generate_iter(self, prompts, sampling_params, request_ids=None, shared_prefix=None):
            for output in super().generate_iter(prompts, sampling_params, request_ids, shared_prefix):
                written.append(batch.output.read_bytes())
                yield output

    main(batch.arguments(), make_llm=Watched)
    assert all(content.endswith(b"\n") for content in written)
    num_rows = [content.count(b"\n") for content in written]
    assert num_rows[0] == 3 and num_rows == sorted(num_rows) and num_rows[-1] >= NUM_ROWS - 2


def start(batch, delay):
    environment = {**os.environ, "FAKE_DELAY": str(delay), "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([*FAKE_COMMAND, *batch.arguments()], env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_rows(batch, process, count):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if batch.output.exists() and len(batch.rows) >= count:
            return
        time.sleep(0.005)
    raise AssertionError(f"no {count} rows; exit code {process.poll()}, {process.stderr.read()}")


def test_kill_minus_nine_again_and_again_loses_and_doubles_nothing(batch):
    batch.write(LINES[:3] + [f'{{"prompt": "prompt {i}", "n": 2}}' for i in range(30)])
    assert batch.run() == 0
    undisturbed = sorted(batch.rows)
    batch.output.unlink()
    for count in (1, 8, 20):
        process = start(batch, delay=0.02)
        wait_for_rows(batch, process, count)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stderr.close()
    before = batch.rows
    assert 20 <= len(before) < 32
    assert batch.run() == 0
    assert sorted(batch.rows) == undisturbed


def test_control_c_ends_with_130_and_one_line_and_the_run_goes_on(batch):
    batch.write([f'{{"prompt": "prompt {i}"}}' for i in range(30)])
    process = start(batch, delay=0.05)
    wait_for_rows(batch, process, 2)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert message.startswith("jaxpaged: interrupted") and message.count("\n") == 1
    assert 2 <= len(batch.rows) < 30
    assert batch.run() == 0 and len(batch.rows) == 30
