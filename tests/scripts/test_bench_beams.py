"""scripts/bench/beams.py says where a step's time goes, and what transformers takes for the same."""

from __future__ import annotations

import json

import beams as bench_beams
import pytest
from paths import ROOT

MODEL = ROOT / "checkpoints" / "tiny-python"


@pytest.mark.slow
def test_the_last_line_has_every_case_and_its_parts_add_up(capsys):
    options = ["--cases", "2x2", "1x16", "--prompt-len", "20", "--max-tokens", "4", "--repeats", "1", "--peer", "no"]
    assert bench_beams.main([str(MODEL), *options]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [case["case"] for case in report["cases"]] == ["2 x 2", "1 x 16"]
    for case, beams in zip(report["cases"], (4, 16), strict=True):
        assert case["compilations"] == case["preemptions"] == 0
        assert case["beam_tokens_per_second"] == pytest.approx(beams * 4 / case["seconds"], rel=1e-2)
        assert case["device_ms"] + case["select_ms"] + case["host_ms"] == pytest.approx(case["step_ms"], abs=1e-2)
        assert 0 < case["choose_ms"] and 0 < case["host_share"] < 1
    assert report["transformers"] == {"left_out": "not asked for"}


def test_a_pool_of_the_promised_size_never_preempts():
    args = bench_beams.parse_args(["--prompt-len", "512", "--max-tokens", "128"])
    assert bench_beams.pages_of(bench_beams.Case(4, 64), args) == 2741  # 5.7 GB of 8B shapes in 16 bits


def test_the_peer_gets_the_models_shapes():
    transformers = pytest.importorskip("transformers", reason="the peer is optional")
    config = bench_beams.peer_config(MODEL)
    assert isinstance(config, transformers.LlamaConfig) and config.num_key_value_heads == 2
