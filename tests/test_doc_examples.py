"""What the pages tell a reader to run, runs as it stands there: their Python in order, in one namespace, and their
commands one after the other, in a folder that is not the repository's.

Here on a model of one layer with the bundled one's tokenizer, in steps of few sizes, so that little is compiled; in the
slow tests on the bundled model itself.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tour
from fake_llm import FakeLLM
from helpers import all_but_slow
from paths import ROOT
from toy import few_programs, save_small_model

import jaxpaged
from jaxpaged import LLM, demo_model
from jaxpaged.cli.main import main, make_parser

PAGES = ("README.md", "docs/guide.md", "docs/search.md", "docs/from_vllm.md", "docs/from_transformers.md")
FEW_SIZES = {"max_num_seqs": 8, "max_num_batched_tokens": 128, "max_model_len": 256, "num_pages": 500}
#: Of a command: it takes minutes, or wants what is not here.
LONG = ("# two cores: minutes", "# a GPU")


def fragments(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


class SmallLLM(LLM):
    """An LLM whose steps come in few sizes."""

    def __init__(self, model, tokenizer=None, **options):
        given = {name: value for name, value in options.items() if value is not None}
        super().__init__(model, tokenizer, **{**FEW_SIZES, **given})
        few_programs(self.engine)

    def rebuild(self, **options):
        super().rebuild(**options)
        few_programs(self.engine)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """As the bundled one, but of one layer and with random weights."""
    return save_small_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """A folder with what a page may take for granted: the repository's scripts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    return tmp_path


@pytest.fixture
def on_small_model(monkeypatch, small_model, elsewhere):
    monkeypatch.setattr(demo_model, "directory", lambda: small_model)
    monkeypatch.setitem(jaxpaged.__dict__, "LLM", SmallLLM)


def run_python(page: str, skip: str = "pallas_kernels") -> dict[str, object]:
    scope: dict[str, object] = {}
    for block in fragments(page, "python"):
        if skip not in block:
            exec(compile(block, page, "exec"), scope)
    return scope


@pytest.mark.slow
@pytest.mark.parametrize("page", all_but_slow(PAGES, *(page for page in PAGES if page != "docs/search.md")))
def test_the_python_of_a_page_runs(page, on_small_model, capsys):
    scope = run_python(page)
    assert capsys.readouterr().out.strip()
    if page == "README.md":
        assert scope["kv"].pages_at_peak < scope["kv"].logical_pages_at_peak, "the example of sharing shares nothing"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs_on_the_bundled_model(page, elsewhere, capsys):
    run_python(page)
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Mosaic GPU kernels need JAX 0.11")
def test_the_kernels_of_the_guide_run(monkeypatch):
    """In Pallas' interpreter, in two programs."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels import paged_decode

    few = functools.partial(paged_decode.paged_decode, num_programs=2)
    monkeypatch.setattr(paged_decode, "paged_decode", few)
    (block,) = (block for block in fragments("docs/guide.md", "python") if "pallas_kernels" in block)
    scope: dict[str, object] = {"jnp": jax.numpy}
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        exec(compile(block, "docs/guide.md", "exec"), scope)
    assert np.asarray(scope["out"]).shape == (1, 4, 64)


def commands(page: str) -> list[str]:
    """Lines of the page's shell fragments that are ours, or make a file for one that is."""
    lines = [line for block in fragments(page, "sh") for line in block.splitlines()]
    return [line for line in lines if re.match(r"jaxpaged|printf|echo", line) and not line.endswith(LONG)]


@pytest.mark.parametrize("page", [*PAGES, "docs/batch.md", "docs/results.md"])
def test_the_commands_of_a_page_have_the_flags_that_there_are(page):
    for line in commands(page):
        words = shlex.split(line, comments=True)
        if words[0] == "jaxpaged":
            make_parser().parse_args(words[1:])


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_the_commands_of_a_page_run(page, elsewhere):
    run_script(commands(page))
    assert (elsewhere / "pool.html").exists() or page != "README.md"


def test_the_lines_of_batch_files_run_by_the_commands_beside_them(elsewhere):
    """By a stand-in for the model; in the slow tests by the model."""
    write_batch_files()
    for line in commands("docs/batch.md"):
        if line.startswith("jaxpaged"):
            assert main(shlex.split(line)[1:], make_llm=FakeLLM) == 0
        else:
            subprocess.run(line, shell=True, check=True)
    assert len(Path("out.jsonl").read_text().splitlines()) == 3
    assert len(Path("answers.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_the_lines_of_batch_files_run_on_the_bundled_model(elsewhere):
    write_batch_files()
    run_script(commands("docs/batch.md"))


def write_batch_files() -> None:
    lines = [line for block in fragments("docs/batch.md", "json") for line in block.splitlines()]
    talks = [line for line in lines if "messages" in json.loads(line).get("body", json.loads(line))]
    Path("talks.jsonl").write_text("\n".join(talks))
    Path("prompts.jsonl").write_text("\n".join(line for line in lines if line not in talks))


def run_script(lines: list[str]) -> None:
    """By the shell, in which `jaxpaged` is the command of this interpreter."""
    Path("bin").mkdir()
    Path("bin/jaxpaged").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m jaxpaged "$@"\n')
    Path("bin/jaxpaged").chmod(0o755)
    environment = {**os.environ, "PATH": f"{Path.cwd() / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    subprocess.run(["bash", "-e"], input="\n".join(lines), text=True, env=environment, check=True)


def printed_by_tour() -> dict[str, str]:
    """Run docs/tour.ipynb: what each of its cells of code prints, and how often it draws."""
    printed = {}
    for cell, outputs in tour.run_cells(json.loads(tour.TOUR.read_text())):
        figures = sum(output["output_type"] == "display_data" for output in outputs)
        printed[cell["id"]] = stored_text(outputs) + f"{figures} figures"
    return printed


def stored_text(outputs: list[dict]) -> str:
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


@pytest.mark.filterwarnings("ignore:Glyph")  # of what this model writes
@pytest.mark.slow
def test_the_tour_runs_and_shows_what_it_says(on_small_model):
    printed = "".join(printed_by_tour().values())
    assert printed.count("the same texts: True") == 2 and printed.count("1 figures") == 7
    assert re.search(r"[1-9]\d* preemptions", printed) and "; 2 copied" in printed
    assert re.search(r"found: \[0, [1-9]", printed)


@pytest.mark.slow
def test_the_tour_keeps_what_it_prints_on_the_bundled_model(elsewhere):
    cells = [cell for cell in json.loads(tour.TOUR.read_text())["cells"] if cell["cell_type"] == "code"]
    stored = {cell["id"]: stored_text(cell["outputs"]) for cell in cells}
    printed = {name: text.rpartition("\n")[0] for name, text in printed_by_tour().items()}
    assert printed == {name: text.removesuffix("\n") for name, text in stored.items()}


def test_the_tour_is_small_and_has_been_run():
    assert tour.TOUR.stat().st_size < 300_000
    outputs = [cell["outputs"] for cell in json.loads(tour.TOUR.read_text())["cells"] if cell["cell_type"] == "code"]
    assert sum(map(len, outputs)) > 10


@pytest.mark.slow
def test_the_python_of_the_page_of_constraints_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    np.save("codes.npy", np.random.default_rng(0).integers(0, 256, (1000, 4)))
    llm = LLM(ROOT / "checkpoints" / "tiny-python", num_pages=600, max_num_seqs=64)
    scope: dict[str, object] = dict(llm=llm, prompts=["def f("], seen_by_each_user=[np.arange(3), np.arange(5)])
    for block in fragments("docs/constraints.md", "python"):
        exec(compile(block, "docs/constraints.md", "exec"), scope)
    assert len(scope["recommended"]) == 64 and all(item is not None for item, _ in scope["recommended"])
