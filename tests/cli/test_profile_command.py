"""`jaxpaged profile`: a trace that names what the host does in every step."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import pytest
from toy import save_toy_checkpoint

from jaxpaged.cli.errors import USAGE
from jaxpaged.cli.main import main
from jaxpaged.engine.profile import trace_to
from jaxpaged.host.account.phases import PHASES

SIZES = ["--num-pages", "40", "--max-model-len", "32", "--max-num-seqs", "4", "--page-size", "4"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(save_toy_checkpoint(tmp_path_factory.mktemp("profile") / "toy"))


def test_every_step_has_every_phase_in_the_trace(directory, tmp_path, capsys):
    file = tmp_path / "run.json.gz"
    assert main(["profile", directory, "--requests", "3", "--workload", "fixed:4:5", "-o", str(file), *SIZES]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"5 steps of 3 requests, written to {file}"
    assert [line.split()[0] for line in printed[2:]] == list(PHASES)
    with gzip.open(file, "rt") as lines:
        names = Counter(event.get("name") for event in json.load(lines)["traceEvents"])
    assert {name: names[name] for name in PHASES if name != "schedule"} == dict.fromkeys(PHASES[1:], 5)
    assert names["schedule"] == 6  # and once for nothing, behind the last


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-o", "trace.txt"], "the trace is compressed JSON: name it as trace.json.gz"),
        (["--workload", "novels"], "novels"),
        (["--workload", "fixed:100:5"], "max_model_len|32"),
        (["--requests", "0"], "at least 1 request"),
    ],
)
def test_what_cannot_run_is_one_line_before_a_model_is_loaded(directory, capsys, monkeypatch, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    assert main(["profile", directory, *SIZES, *flags], make_llm=lambda **_: pytest.fail("loaded")) == USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert any(part in line for part in message.split("|"))
    assert not list(tmp_path.iterdir())


def test_a_profile_whose_folder_is_not_there_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="cannot be written: .*absent is not a directory"):
        with trace_to(tmp_path / "absent" / "trace.json.gz"):
            pytest.fail("the block ran")
