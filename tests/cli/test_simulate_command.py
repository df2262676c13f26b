"""`jaxpaged simulate`, the account of a run as a file, and the script that reproduces the paper's memory figures."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest
import reproduce as reproduce_paper
from toy import save_toy_checkpoint

from jaxpaged.cli.main import main
from jaxpaged.host.account.memory_account import CATEGORIES


def simulate(*arguments) -> int:
    return main(["simulate", *map(str, arguments)])


def test_all_systems_run_one_workload_and_the_last_line_is_json(capsys):
    assert simulate("--workload", "fixed:100:60", "--requests", 60, "--max-model-len", 256, "--num-pages", 100) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[1:]] == [
        "paged", "contiguous-max", "contiguous-pow2", "contiguous-oracle",
        "dense", "dense-static", "dense-static-global",
    ]  # fmt: skip
    results = json.loads(last)["results"]
    for result in results.values():
        assert sum(result["percent_of_pool"][part] for part in CATEGORIES) == pytest.approx(100, abs=0.01)
    assert results["contiguous-oracle"]["mean_running_sequences"] == 6  # chunks of 16 pages
    assert results["paged"]["mean_running_sequences"] > 9
    assert results["paged"]["percent_of_pool"]["used"] > results["contiguous-max"]["percent_of_pool"]["used"]


def test_the_account_has_a_row_a_step_that_adds_up(tmp_path):
    path = tmp_path / "account.csv"
    arguments = ["--workload", "fixed:100:60", "--requests", 8, "--max-model-len", 256, "--num-pages", 100]
    assert simulate(*arguments, "--kv-cache", "contiguous-pow2", "--account", path) == 0
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(len(rows))) and len(rows) == 120
    assert {sum(int(row[part]) for part in CATEGORIES) for row in rows} == {99 * 16}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-cache", "slabs"], "kv_cache is 'slabs'; choose one of paged, contiguous-max"),
        (["--kv-cache", "dense-slots"], "kv_cache is 'dense-slots'; it is called 'dense' now"),
        (["--workload", "novels"], "unknown workload 'novels'"),
        (["--workload", "no.jsonl"], "no.jsonl: No such file"),
        (["--account", "a.csv"], "--account writes one run, but 7 systems are to run"),
        (["--account", "a.txt", "--kv-cache", "paged"], "written as .csv or .json"),
        (["--num-pages", "50"], "raise num_pages"),
        (["--rate", "0"], "rate must be above 0"),
        (["--step-ms", "0"], "step_seconds must be above 0"),
    ],
)
def test_what_cannot_run_is_one_line_and_exit_code_2(capsys, arguments, message):
    assert simulate("--requests", 5, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and message in captured.err and not captured.out


def test_simulating_needs_no_jax():
    code = (
        "import sys; from jaxpaged.cli.main import main; main(['simulate', '--requests', '5', '--kv-cache', 'paged']); "
        "kernels = {name for name in sys.modules if name.startswith('pallas_kernels.')}; "
        "sys.exit('jax' in sys.modules or 'jaxlib' in sys.modules or kernels != {'pallas_kernels.cascade_groups'})"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_generate_writes_its_account_and_takes_the_system(tmp_path, capfd):
    model, path = save_toy_checkpoint(tmp_path / "model"), tmp_path / "account.json"
    texts = []
    for kv_cache in ("paged", "contiguous-oracle"):
        arguments = [
            "generate", str(model), "--prompt", "abc", "--max-tokens", "9", "--ignore-eos", "--temperature", "0",
            "--num-pages", "40", "--page-size", "4", "--max-model-len", "64", "--kv-cache", kv_cache,
            "--account", str(path), "--dtype", "float32",
        ]  # fmt: skip
        assert main(arguments) == 0
        texts.append(json.loads(capfd.readouterr().out)["outputs"][0]["token_ids"])
        account = json.loads(path.read_text())
        assert account["summary"]["steps"] == 9 and account["steps"]["used"] == list(range(3, 12))
        assert account["steps"]["reserved"] == (list(range(9, 0, -1)) if kv_cache != "paged" else [0] * 9)
    assert texts[0] == texts[1]


def test_an_account_that_cannot_be_written_is_refused_before_the_model_is_opened(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert main(["generate", str(tmp_path), "--prompt", "a", "--account", str(tmp_path / "no" / "a.csv")]) == 2
    assert "--account" in capsys.readouterr().err


def test_the_memory_figure_of_the_paper_is_reproduced(tmp_path, capsys):
    """One seed and few requests: the full run is in docs/results.md."""
    path = tmp_path / "figures.json"
    arguments = ["2", "--seeds", "1", "--requests", "400", "--plot", str(tmp_path), "--json", str(path)]
    assert reproduce_paper.main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {path}"
    rows = json.loads(path.read_text())["figures"]["2"]["rows"]
    used = {row["what"].split(":")[0]: row["mean"] for row in rows if "token states" in row["what"]}
    assert used["Orca (Max)"] == pytest.approx(20.4, abs=3.5)
    assert used["Orca (Pow2)"] == pytest.approx(26.8, abs=3)
    assert used["Orca (Oracle)"] == pytest.approx(38.2, abs=3)
    assert used["paged"] == pytest.approx(96.3, abs=1)
    assert (tmp_path / "figure-2.png").stat().st_size > 1000
