"""What a batch says off a terminal: lines while it runs, one at its end, all of it JSON where that is asked for; -q."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from fake_llm import FakeLLM
from helpers import all_but_slow
from paths import GOLDENS, ROOT

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.outputs import KVUsage
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.cli.json_log import JsonLines, json_lines
from jaxpaged.cli.main import main
from jaxpaged.cli.run_report import RunReport, duration
from jaxpaged.config import CacheConfig
from jaxpaged.host.account.accounting import RunStats

SAMPLE = SamplingParams()
FAKE_COMMAND = [sys.executable, str(ROOT / "tests" / "fake_llm.py")]


def stats(tokens=0, seconds=1.0):
    run = RunStats.for_cache(CacheConfig(16, 11))
    run.num_generated_tokens, run.seconds["total"] = tokens, seconds
    return run


def finished(report, params=SAMPLE, shared=0, has_failed=False):
    output = SimpleNamespace(kv=KVUsage(1, 1 + shared, shared, 0, 0, 0, 0))
    report.add(SimpleNamespace(params=[params]), [output], has_failed)


def test_a_line_comes_at_every_interval_with_rows_rate_pool_and_time_left(capfd):
    with RunReport(8, 2, lambda: stats(1000, 4.0), interval=0.05) as report:
        time.sleep(0.12)
        finished(report)
        finished(report, has_failed=True)
        time.sleep(0.1)
    lines = capfd.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 5
    assert lines[0] == "jaxpaged: 2 of 8 rows, 250 tokens/s, pool 0%, 0:00:00 gone, time left unknown"
    assert lines[-1] == "jaxpaged: 4 of 8 rows (1 failed), 250 tokens/s, pool 0%, 0:00:00 gone, time left 0:00:00"


def test_time_left_is_what_the_rows_of_this_run_took(monkeypatch):
    report = RunReport(110, 100, stats)
    with report:
        for _ in range(4):
            finished(report)
        report._began -= 20
        assert report._progress()["seconds_left"] == pytest.approx(30, abs=0.2)
    assert [duration(seconds) for seconds in (0.4, 61, 3 * 3600 + 59)] == ["0:00:00", "0:01:01", "3:00:59"]


def test_the_summary_says_what_ran_what_failed_and_what_was_shared(capfd):
    run = stats(5000, 2.0)
    run.preemptions, run.swaps_out, run.num_prompt_tokens, run.cached_tokens = 3, 1, 400, 100
    with RunReport(10, 4, lambda: run) as report:
        finished(report, SamplingParams(n=3), shared=20)
        finished(report, BeamSearchParams(beam_width=2), shared=7)
    report.say_summary(num_earlier=4, num_failed=2)
    assert capfd.readouterr().err == (
        "jaxpaged: 10 rows (4 of them there before), 2 failed; 5,000 tokens in 0:00:00, 2,500 tokens/s; 3 preemptions "
        "(1 of them swapped); shared: 100 tokens of prompts (25%) by prefix caching, 20 pages by samples of one "
        "prompt, 7 pages by beams of one prompt\n"
    )


def test_a_command_says_its_summary_in_a_pipe(model, tmp_path, capfd):
    (tmp_path / "in").write_text('{"prompt": "a"}\n{"prompt": 5}\n{"prompt": "' + "x" * 300 + '"}\n')
    arguments = ["generate", model, "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert main(arguments, make_llm=FakeLLM) == 1
    summary, failed = capfd.readouterr().err.splitlines()
    said = "jaxpaged: 3 rows, 2 failed; 0 tokens in 0:00:00, 0 tokens/s; 0 preemptions; shared: nothing"
    assert (summary, failed.split(";")[0]) == (said, "jaxpaged: 2 of 3 lines failed: 2, 3")
    kept = (tmp_path / "out").read_text().splitlines()
    (tmp_path / "out").write_text("".join(f"{row}\n" for row in kept if "error" in json.loads(row)))
    assert main(arguments, make_llm=FakeLLM) == 1
    assert "jaxpaged: 3 rows (2 of them there before), 2 failed; " in capfd.readouterr().err


def test_quiet_says_only_what_is_wrong(model, tmp_path, capfd):
    (tmp_path / "in").write_text('{"prompt": "a"}\n{"prompt": 5}\n')
    arguments = ["generate", model, "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "-q"]
    for _ in range(2):
        assert main(arguments, make_llm=FakeLLM) == 1
        assert capfd.readouterr().err == f"jaxpaged: 1 of 2 lines failed: 2; the reasons are in {tmp_path / 'out'}\n"


def events_of(text):
    return [json.loads(line) for line in text.splitlines()]


def test_with_json_every_line_is_an_event(model, tmp_path, capfd):
    (tmp_path / "in").write_text('{"prompt": "ä"}\n{"prompt": 5}\n')
    arguments = ["generate", model, "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--log-format", "json"], make_llm=FakeLLM) == 1
    summary, failed = events_of(capfd.readouterr().err)
    assert summary["event"] == "summary" and (summary["rows"], summary["failed"]) == (2, 1)
    assert set(summary) == {
        "event", "rows", "earlier", "failed", "prompt_tokens", "tokens", "tokens_per_second", "seconds", "preemptions",
        "swapped", "recomputed_tokens", "shared",
    }  # fmt: skip
    assert failed == {"event": "message", "message": f"1 of 2 lines failed: 2; the reasons are in {tmp_path / 'out'}"}
    assert main([*arguments, "--log-format", "json", "--n", "0"], make_llm=FakeLLM) == 2
    (error,) = events_of(capfd.readouterr().err)
    assert error["event"] == "message" and error["message"].startswith("n must be at least 1")
    assert main([*arguments, "--log-format=json", "--no-such"], make_llm=FakeLLM) == 2
    assert "--no-such" in events_of(capfd.readouterr().err)[0]["message"]
    assert main([*arguments, "--seed", "-1"], make_llm=FakeLLM) == 2
    assert capfd.readouterr().err.startswith("jaxpaged: ")  # nothing of it is left


def test_progress_is_an_event_too(capfd):
    with json_lines(), RunReport(8, 2, lambda: stats(1000, 4.0), interval=0.03) as report:
        finished(report)
        time.sleep(0.05)
    event = events_of(capfd.readouterr().err)[0]
    assert event.pop("seconds_left") >= 0 and event.pop("seconds") >= 0
    assert event == {
        "event": "progress", "done": 3, "rows": 8, "failed": 0, "tokens": 1000, "tokens_per_second": 250.0,
        "pool_used": 0.0,
    }  # fmt: skip


def test_text_loggers_and_lines_in_pieces_become_events():
    written = io.StringIO()
    lines = JsonLines(written)
    print("jaxpaged: two", "words", file=lines)
    lines.write("a be")
    lines.write('gun "line"\nand another\n\n')
    assert [event["message"] for event in events_of(written.getvalue())] == [
        "two words", 'a begun "line"', "and another"
    ]  # fmt: skip
    assert not lines.isatty()


def test_what_loggers_say_is_an_event(capfd):
    with json_lines():
        logging.getLogger("jaxpaged").warning("the %s", "pool")
        print("unfinished", end="", file=sys.stderr)
    said = [{"event": "log", "level": "WARNING", "message": "the pool"}, {"event": "message", "message": "unfinished"}]
    assert events_of(capfd.readouterr().err) == said


def test_an_interrupt_is_an_event(model):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "FAKE_DELAY": "5"}
    arguments = ["generate", model, "--prompt", "a", "--log-format", "json", "--output", f"{model}/../out"]
    command = subprocess.Popen([*FAKE_COMMAND, *arguments], env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not os.path.exists(f"{model}/../out") and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    command.send_signal(2)
    _, said = command.communicate(timeout=30)
    assert command.returncode == 130
    assert events_of(said.decode())[-1]["message"].startswith("interrupted; the same command")


@pytest.mark.parametrize("columns", all_but_slow([60, 80], 80))
def test_on_a_terminal_there_is_a_bar_as_wide_as_it_and_a_summary(model, tmp_path, columns):
    (tmp_path / "in").write_text("a\nb\nc\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": str(columns), "TERM": "xterm"}
    arguments = ["generate", model, "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    terminal, slave = pty.openpty()
    command = subprocess.Popen([*FAKE_COMMAND, *arguments], env=environment, stderr=slave)
    assert command.wait(timeout=60) == 0
    os.close(slave)
    said = os.read(terminal, 65536).decode()
    os.close(terminal)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said).replace("\r", "\n").split("\n")
    lines = [line for line in lines if line.strip()]
    bars = [line for line in lines if "3/3" in line]
    assert bars and all(len(line) < columns and "━" in line for line in bars)
    assert lines[-1].startswith("jaxpaged: 3 rows, 0 failed")


@pytest.mark.slow
def test_the_real_engine_tells_what_samples_and_caches_shared(tmp_path, capfd):
    (tmp_path / "in").write_text("\n".join(json.dumps({"prompt": list(range(2, 42))}) for _ in range(3)))
    arguments = ["generate", str(GOLDENS / "llama_tied"), "--input", str(tmp_path / "in"), "--log-format", "json"]
    assert main([*arguments, "--n", "2", "--max-tokens", "3", "--page-size", "4", "--num-pages", "100"]) == 0
    summary = events_of(capfd.readouterr().err)[-1]
    assert (summary["rows"], summary["tokens"], summary["prompt_tokens"]) == (3, 18, 120)
    assert summary["shared"]["samples_pages"] == 3 * 10 and summary["shared"]["beams_pages"] == 0
    assert summary["shared"]["page_share"] > 0.3
