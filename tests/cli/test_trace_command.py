"""`jaxpaged trace`: what it writes, and one line for every kind of bad usage, before any work is done."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import traces as make_traces
from toy import save_toy_checkpoint
from trace_replay import Replay

from jaxpaged.cli.main import main
from jaxpaged.cli.trace import EPILOG
from jaxpaged.llm import LLM
from jaxpaged.trace_page import dump_trace, example_names, example_trace


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return str(save_toy_checkpoint(tmp_path_factory.mktemp("toy") / "model"))


def read_trace(path: Path) -> dict:
    page = path.read_text(encoding="utf-8")
    embedded = re.search(r'<script type="application/json" id="trace">(.*?)</script>', page, re.DOTALL)
    assert embedded is not None
    return json.loads(embedded[1])


def test_the_examples_of_the_help_run(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = [shlex.split(line) for line in EPILOG.splitlines() if line.startswith("  jaxpaged ")]
    assert len(examples) == 3
    for example in examples:
        assert main([toy if word == "MODEL" else word for word in example[1:]]) == 0
    assert [request["kind"] for request in read_trace(tmp_path / "pool.html")["requests"]] == ["beams", "beams"]


def test_samples_of_a_prompt_share_its_pages_and_are_copied_for_all_but_one(toy, tmp_path, capfd):
    arguments = ["trace", toy, "--prompt", "abcdef", "--n", "3", "--max-tokens", "6", "--ignore-eos"]
    outputs = ["--html", str(tmp_path / "pool.html"), "--json", str(tmp_path / "pool.json")]
    assert main([*arguments, *outputs]) == 0
    trace = json.loads((tmp_path / "pool.json").read_text(encoding="utf-8"))
    assert read_trace(tmp_path / "pool.html") == trace
    assert (trace["num_pages"], trace["page_size"], trace["sequences"]) == (41, 4, [0, 0, 0])
    assert trace["requests"] == [{"id": "0", "kind": "samples", "width": 3, "prompt_len": 6}]
    assert (trace["title"], trace["note"]) == ("model: 3 samples", "abcdef")
    names = [event[0] for frame in trace["frames"] for event in frame.get("events", [])]
    assert (names.count("fork"), names.count("copy"), names.count("finish")) == (2, 2, 3)
    replay = Replay(trace)
    for frame in trace["frames"]:
        replay.apply(frame)
    texts = {"".join(trace["pieces"][str(token)] for token in tokens) for tokens in replay.tokens}
    assert len(texts) == 3 and all(text.startswith("abcdef") and len(text) >= 12 for text in texts)
    assert capfd.readouterr().err == f"jaxpaged: {outputs[1]} and {outputs[3]}: 6 steps, 3 sequence(s)\n"


def test_beams_in_a_small_pool_are_preempted_on_the_page_as_in_the_run(toy, tmp_path):
    prompts = ["--prompt", "abcdefgh", "--prompt", "ijklmnop"]
    options = ["--beam-width", "3", "--max-tokens", "16", "--num-pages", "16", "--preemption", "recompute"]
    assert main(["trace", toy, *prompts, *options, "--json", str(tmp_path / "pool.json")]) == 0
    trace = json.loads((tmp_path / "pool.json").read_text())
    events = [event for frame in trace["frames"] for event in frame.get("events", [])]
    assert {request["kind"] for request in trace["requests"]} == {"beams"}
    assert ["preempt", 1, "recompute"] in events and ["resume", 1, "recompute"] in events


def test_a_recorder_sees_one_run_and_the_next_has_none(toy):
    llm = LLM(toy, page_size=4, num_pages=20)
    recorder = llm.record_trace()
    llm.generate("abc")
    assert len(recorder.trace("first")["requests"]) == 1 and llm.engine.recorder is None
    frames = len(recorder.frames)
    llm.generate("abc")
    assert len(recorder.frames) == frames


@pytest.mark.parametrize("name", example_names())
def test_an_example_is_written_as_it_is_bundled(name, tmp_path):
    assert main(["trace", "--example", name, "--html", str(tmp_path / "pool.html")]) == 0
    assert read_trace(tmp_path / "pool.html") == example_trace(name)


@pytest.mark.parametrize("option", [["--seed", "3"], ["--n", "2"], ["--num-pages", "9"]])
def test_an_example_takes_no_options_of_a_run(option, tmp_path, capsys):
    assert main(["trace", "--example", "beam-search", "--html", str(tmp_path / "pool.html"), *option]) == 2
    assert "--example replays a bundled run" in capsys.readouterr().err


def test_the_bundled_examples_are_what_the_scheduler_does_today(tmp_path):
    assert sorted(make_traces.EXAMPLES) == example_names()
    make_traces.write(tmp_path)
    for name in example_names():
        assert (tmp_path / f"{name}.json").read_text(encoding="utf-8") == dump_trace(example_trace(name)) + "\n"


def frames_of(name: str) -> list[tuple[str, list[list[int]], list[int]]]:
    """ "step kind", tables and filled positions of the sequences that hold pages, with the figure's page numbers."""
    trace = example_trace(name)
    replay, shift = Replay(trace), trace["first_label"] - 1
    seen = []
    for frame in trace["frames"]:
        replay.apply(frame)
        tables = [[page + shift for page in table] for table in replay.tables if table]
        seen.append((f"{frame['step']} {frame['kind']}", tables, [count for count in replay.num_slots if count]))
    return seen


def test_the_examples_have_the_page_numbers_of_the_papers_figures():
    assert frames_of("one-request")[:3] == [
        ("1 prefill", [[7, 1]], [7]), ("2 decode", [[7, 1]], [8]), ("3 decode", [[7, 1, 3]], [9]),
    ]  # fmt: skip
    assert frames_of("two-requests")[2] == ("3 decode", [[7, 1, 3], [5, 2]], [9, 7])
    assert frames_of("parallel-sampling")[:2] == [
        ("1 prefill", [[7, 1], [7, 1]], [7, 7]), ("2 decode", [[7, 3], [7, 1]], [8, 8]),
    ]  # fmt: skip
    beams = {when: sorted(tables) for when, tables, _ in frames_of("beam-search")}
    assert beams["13 decode"] == [[0, 1, 3, 5], [0, 1, 3, 6], [0, 1, 3, 7], [0, 2, 4, 8]]
    assert beams["13 commit"] == [[0, 1, 3, 6], [0, 1, 3, 6], [0, 1, 3, 7], [0, 1, 3, 7]]
    assert beams["14 decode"] == [[0, 1, 3, 6, 9], [0, 1, 3, 6, 10], [0, 1, 3, 7, 11], [0, 1, 3, 7, 12]]
    free = [event[1:] for event in example_trace("beam-search")["frames"][16]["events"] if event[0] == "free"]
    assert [[page - 1 for page in pages] for pages in free] == [[2, 4, 5, 8]]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--prompt", "a"], "--html"),
        (["--html", "x.html"], "MODEL"),
        (["MODEL", "--html", "x.html"], "--prompt"),
        (["--example", "none", "--html", "x.html"], "invalid choice: 'none'"),
        (["--example", "beam-search", "--prompt", "a", "--html", "x.html"], "bundled"),
        (["--example", "beam-search", "--n", "2", "--html", "x.html"], "bundled"),
        (["MODEL", "--prompt", "a", "--n", "2", "--beam-width", "2", "--html", "x.html"], "--n is of sampling"),
        (["MODEL", "--prompt", "a", "--n", "0", "--html", "x.html"], "n"),
        (["MODEL", "--prompt", "a", "--html", "missing/x.html"], "missing is not a directory"),
        (["MODEL", "--prompt", "a", "--html", "."], "is a directory"),
        (["MODEL", "--prompt", "a", "--html", "x", "--json", "x"], "two files"),
    ],
)
def test_bad_usage_is_one_line_before_any_model_is_loaded(arguments, expected, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def no_llm(**options):
        raise AssertionError("a model was loaded")

    assert main(["trace", *arguments], make_llm=no_llm) == 2
    message = capfd.readouterr().err
    assert message.count("\n") == 1 and message.startswith("jaxpaged: ") and expected in message
    assert list(tmp_path.iterdir()) == []


def test_what_the_pool_cannot_hold_is_refused_with_the_numbers(toy, tmp_path, capfd):
    output = tmp_path / "pool.html"
    assert main(["trace", toy, "--prompt", "abc", "--num-pages", "4", "--html", str(output)]) == 2
    assert "prompt 1: prompt of 3 tokens" in capfd.readouterr().err and not output.exists()
    assert main(["trace", str(tmp_path / "missing"), "--prompt", "abc", "--html", str(output)]) == 2
    assert "missing" in capfd.readouterr().err and not output.exists()
