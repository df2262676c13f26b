"""The attention benchmark runs wherever jax does, and says what it could not run."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
from paths import ROOT

from jaxpaged.host.step.cascade import CascadeRule, plan_groups

SCRIPTS = ROOT / "scripts"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("attention")
    monkeypatch.setattr(module, "WRITE_LAYERS", 2)
    monkeypatch.setattr(module, "COPY_LAYERS", 2)
    return module


@pytest.mark.slow
def test_every_kernel_has_its_table_and_every_implementation_its_time_or_its_reason(bench, capsys, tmp_path):
    path = tmp_path / "figures.json"
    shape = ["--heads", "4/2", "--head-dim", "64", "--page-size", "8", "--dtype", "float16"]
    cases = ["--decode", "3x40", "--prefill", "8+16", "--cascade", "2x3@32+9", "--kernels", *bench.KERNELS]
    assert bench.main([*shape, *cases, "--quick", "--repeats", "1", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "WRONG" not in out and out.splitlines()[-1] == f"wrote {path}"
    results = json.loads(path.read_text())["results"]
    assert [(row["kernel"], row["case"], row["implementation"]) for row in results] == [
        ("decode", "3 x 40", "pallas"),
        ("decode", "3 x 40", "pallas-invariant"),
        ("decode", "3 x 40", "reference"),
        ("decode", "3 x 40", "jax-triton"),
        ("decode", "3 x 40", "cudnn"),
        ("decode", "3 x 40", "fa3"),
        ("prefill", "1 x 8 + 16", "pallas"),
        ("prefill", "1 x 8 + 16", "reference"),
        ("prefill", "1 x 8 + 16", "cudnn"),
        ("prefill", "1 x 8 + 16", "fa3"),
        ("shared", "2 x 3 @ 32 + 9", "plain"),
        ("shared", "2 x 3 @ 32 + 9", "shared"),
        ("write", "64 tokens", "xla"),
        ("write", "256 tokens", "xla"),
        ("copy", "8 pages", "pallas"),
        ("copy", "8 pages", "xla"),
        ("copy", "64 pages", "pallas"),
        ("copy", "64 pages", "xla"),
    ]
    assert all(("us" in row) != ("reason" in row) for row in results)
    assert all("us" in row for row in results if row["implementation"] in ("reference", "plain", "xla"))


def test_an_implementation_that_fails_is_listed_with_its_reason(bench, capsys):
    def fails():
        raise RuntimeError("no such kernel\nand more")

    report = bench.Report(bench.Card("a device", 1.0, 1.0), repeats=1, implementations=None)
    report.begin("decode")
    report.add("1 x 8", "cudnn", fails)
    assert report.rows[0]["reason"] == "RuntimeError: no such kernel"
    assert "RuntimeError: no such kernel" in capsys.readouterr().out


def test_a_large_or_undefined_difference_is_called_wrong(bench, capsys):
    report = bench.Report(bench.Card("a device", 1.0, 1.0), repeats=1, implementations=None)
    report.begin("decode")
    for difference in (0.01, 0.1, float("nan")):
        report.add("1 x 8", "cudnn", lambda difference=difference: bench.Measurement(1e-6, 1000, difference))
    assert ["WRONG" in line for line in capsys.readouterr().out.splitlines()[2:]] == [False, True, True]


def test_shapes_choose_their_kernels(bench):
    assert bench.parse_args([]).kernels == list(bench.KERNELS)
    assert bench.parse_args(["--prefill", "8", "4+2"]).kernels == ["prefill"]
    assert bench.parse_args(["--prefill", "8", "4+2"]).prefill == [(8, 0), (4, 2)]
    assert bench.parse_args(["--cascade"]).kernels == ["shared"]
    assert bench.parse_args(["--decode", "1x8", "--kernels", "write"]).kernels == ["write"]
    with pytest.raises(SystemExit):
        bench.parse_args(["--decode", "8"])


def test_cases_count_what_they_read_and_compute(bench):
    heads = bench.Heads(num_heads=4, num_kv_heads=2, head_dim=64, page_size=8)
    assert bench.uniform_decode(3, 40, heads).kv_bytes == 3 * 40 * 2 * 2 * 64 * 2
    assert bench.PrefillCase(1, 2, 3, heads).pairs == 4 + 5
    assert bench.PrefillCase(1, 2, 3, heads).flops == 4 * 4 * 64 * 9


def test_samples_share_the_full_pages_of_their_prompt_and_no_other(bench):
    heads = bench.Heads(page_size=8)
    tables = bench.CascadeCase(prompts=2, samples=2, prompt=20, own=10, heads=heads).tables(width=5)
    assert len(set(tables[:, :4].ravel())) == 2 * 2 + 4 * 2
    groups = plan_groups(tables, np.full(4, 30), 8, 2, CascadeRule(0, 1))
    assert groups is not None
    assert sorted(groups.members.tolist()) == [[0, 1], [2, 3]]
    assert groups.own_starts.tolist() == [16] * 4
