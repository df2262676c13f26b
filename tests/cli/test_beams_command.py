"""`jaxpaged beams`: what a search looks like while it runs, its picture, and what is refused before any work."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from toy import save_toy_checkpoint

from jaxpaged import LLM, BeamSearchParams
from jaxpaged.cli.beam_plot import PlottedBeam, all_nodes, build_nodes, last_step, rank_and_place, shown_stubs
from jaxpaged.cli.beam_tree import grow_branches, shown, tree_lines
from jaxpaged.cli.main import main
from jaxpaged.looks.whitespace import visible

PROMPT = "four score"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_toy_checkpoint(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture(scope="module")
def llm(model):
    return LLM(model, page_size=4, num_pages=200, max_num_seqs=16, max_model_len=64)


@pytest.fixture
def run(llm):
    def run(*arguments, model="toy"):
        return main(["beams", model, "--prompt", PROMPT, *map(str, arguments)], make_llm=lambda **_: llm)

    return run


def error_line(capfd):
    captured = capfd.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("jaxpaged: ") and not captured.out
    return captured.err


# Watching


@pytest.mark.parametrize("fields", [{}, dict(num_beam_groups=2, diversity_penalty=1.0), dict(early_stopping=True)])
def test_every_step_can_be_watched_and_the_last_has_the_output(llm, fields):
    params = BeamSearchParams(**{"beam_width": 4, "max_tokens": 6, "stop_token_ids": [31, 94], **fields})
    history = list(llm.watch_beams(PROMPT, params))
    assert [snapshot.step for snapshot in history] == list(range(1, len(history) + 1))
    for before, snapshot in zip([None, *history], history, strict=False):
        for group, search in enumerate(snapshot.searches):
            assert all(len(beam.token_ids) == snapshot.step for beam in search.running)
            if before is not None:
                parents = [before.searches[group].running[place].token_ids for place in search.parents]
                assert [beam.token_ids[:-1] for beam in search.running] == parents
        assert snapshot.pages <= snapshot.logical_pages
    assert all(snapshot.output is None for snapshot in history[:-1])
    (expected,) = llm.beam_search(PROMPT, params)
    output = history[-1].output
    assert [beam.token_ids for beam in output.outputs] == [beam.token_ids for beam in expected.outputs]
    finished = [beam for search in history[-1].searches for beam in search.finished]
    assert sorted(beam.score for beam in finished)[-1] == expected.outputs[0].score


def test_who_stops_watching_ends_the_search(llm):
    for _ in llm.watch_beams(PROMPT, BeamSearchParams(beam_width=4, max_tokens=30)):
        break
    assert not llm.engine.scheduler.has_work
    assert len(llm.beam_search(PROMPT, BeamSearchParams(beam_width=2, max_tokens=3))[0].outputs) == 2


def test_one_prompt_is_watched(llm):
    with pytest.raises(ValueError, match="one prompt, got 2"):
        llm.watch_beams(["a", "b"], BeamSearchParams(beam_width=2))


# The tree


def test_what_beams_have_in_common_is_written_once():
    beams = [([1, 2, 3], "first"), ([1, 2, 4, 5], "second"), ([6], "third"), ([1, 2], "short")]
    lines = tree_lines(grow_branches(beams), lambda before, ids: "".join(map(str, ids)))
    assert lines == [
        "├─ '12'   short",
        "│  ├─ '3'   first",
        "│  └─ '45'   second",
        "└─ '6'   third",
    ]


def test_long_text_shows_its_two_ends():
    assert shown("a\nb") == "'a\\nb'"
    assert len(shown("x" * 500)) == 65 and " ... " in shown("x" * 500)


@pytest.mark.parametrize("fields", [{}, dict(num_beam_groups=2, diversity_penalty=1.0), dict(max_tokens=1)])
def test_the_picture_has_every_beam_and_ranks_what_led_to_a_result(llm, fields):
    params = BeamSearchParams(**{"beam_width": 4, "max_tokens": 6, "n": 2, "ignore_eos": True, **fields})
    history = list(llm.watch_beams(PROMPT, params))
    root = build_nodes(history)
    lowest = rank_and_place(root, params.num_returned)
    nodes = all_nodes(root)
    assert len(nodes) == 1 + 4 * (params.max_tokens - 1) + 4  # running beams of all steps but the last; what finished
    rows = [{node.height for node in nodes if node.rank == rank} for rank in range(1, params.num_returned + 1)]
    assert all(len(row) == 1 for row in rows)  # a row for each result, the best on top
    heights = [row.pop() for row in rows]
    assert heights == sorted(heights, reverse=True) and heights[0] == 0 and lowest < heights[-1]
    for node in nodes:
        assert node.parent is None or node.token_ids[:-1] == node.parent.token_ids
    ranked = {node.rank: node.token_ids for node in nodes if node.finished is not None and node.rank is not None}
    assert ranked == {i + 1: beam.token_ids for i, beam in enumerate(history[-1].output.outputs)}
    assert root.rank == 1


def test_what_led_nowhere_is_counted_where_it_left_its_row():
    root = PlottedBeam(0, [], 0.0)
    best = root.add(PlottedBeam(1, [1], -1.0))
    for token in range(2, 9):
        root.add(PlottedBeam(1, [token], -2.0))
    root.children[-1].add(PlottedBeam(2, [8, 9], -3.0))
    best.rank = root.rank = 1
    *shown_first, others = shown_stubs(root)
    assert [node.token_ids for node in shown_first] == [[8], [2], [3]] and others == 4  # the longest-lived first
    assert [last_step(node) - node.step for node in shown_first] == [1, 0, 0]
    assert shown_stubs(best) == []


def test_whitespace_is_shown_as_in_a_code_editor():
    assert visible("\n    return\tx") == "↵····return→x"
    assert visible("") == "∅" and visible("\x00") == "\\x00"
    assert visible("identifier", 6) == "ident…" and visible("ident", 5) == "ident"


# The command


def test_a_pipe_gets_a_line_a_step_and_then_the_result(run, capfd):
    assert run("--max-tokens", 5, "--beam-width", 3, "--ignore-eos") == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:5]] == [f"step {i:3}" for i in range(1, 6)]
    assert "3 beams, 0 finished" in lines[0] and "without sharing" in lines[0]
    assert lines[5].split() == ["rank", "score", "log-prob.", "tokens", "ended", "text"]
    assert [line.split()[0] for line in lines[6:9]] == ["1", "2", "3"]
    assert lines[9].startswith("pages: ") and "the prompt's 10 tokens were computed once" in lines[9]


def test_a_terminal_sees_the_tree(run, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    assert run("--max-tokens", 4, "--num-beam-groups", 2, "--diversity-penalty", 1) == 0
    out = capsys.readouterr().out
    assert "└─ " in out and "#1 -" in out and "group 2" in out


def test_a_picture_is_drawn(run, tmp_path, capfd):
    path = tmp_path / "tree.png"
    assert run("--max-tokens", 5, "--plot", path) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options, words",
    [
        (("--plot", "tree.gif"), "name a file that ends in one of .png, .pdf, .svg"),
        (("--plot", "nowhere/tree.png"), "nowhere is not a directory"),
        (("--delay", "-1"), "--delay must be from 0 to 3600 seconds, got -1.0"),
        (("--delay", "nan"), "--delay must be from 0 to 3600 seconds, got nan"),
        (("--delay", "inf"), "--delay must be from 0 to 3600 seconds, got inf"),
        (("--beam-width", "0"), "beam_width must be at least 1"),
        (("--beam-width", "17"), "exceed max_num_seqs=16"),
        (("--temperature", "2"), "set do_sample=True"),
        (("--top-p", "0.5"), "unrecognized arguments: --top-p"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(run, capfd, options, words):
    assert run(*options) == 2
    assert words in error_line(capfd)


def test_a_picture_that_would_replace_a_directory_is_refused_before_any_work(run, capfd, tmp_path):
    (directory := tmp_path / "tree.png").mkdir()
    assert run("--plot", directory) == 2
    assert "tree.png is a directory: name a file in it" in error_line(capfd)


def test_help_says_what_the_flags_mean_for_a_search(capsys):
    with pytest.raises(SystemExit):
        main(["beams", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "hypotheses returned, best first (default: as many as beams)" in out
    assert "samples for each prompt" not in out and "0 is greedy" not in out and "ends a sample" not in out


def test_a_picture_without_matplotlib_is_refused_before_any_work(run, capfd, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    assert run("--plot", "tree.png") == 2
    assert "pip install 'jaxpaged[plots]'" in error_line(capfd)


def test_a_model_that_is_not_there_is_refused(capfd):
    assert main(["beams", "/nowhere", "--prompt", "a"]) == 2
    assert "/nowhere" in error_line(capfd)
