"""scripts/bench/step.py says what a step reads, what it took, and that the pool was updated in place."""

from __future__ import annotations

import json

import jax
import pytest
import step as bench_step
from paths import ROOT

MODEL = ROOT / "checkpoints" / "tiny-python"


@pytest.mark.slow
def test_the_last_line_has_the_card_and_every_row(capsys, monkeypatch):
    monkeypatch.setitem(bench_step.COPY_BYTES, "cpu", 1 << 20)
    options = ["--rows", "1", "3", "--context", "33", "--steps", "2", "--repeats", "2", "--dtype", "float32"]
    assert bench_step.main([str(MODEL), *options]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["attention"] == "reference" and report["device"] == jax.devices()[0].device_kind
    assert report["weight_bytes"] == 4 * 5_475_584  # all of them: the embedding is the head too
    assert [result["rows"] for result in report["results"]] == [1, 3]
    for result in report["results"]:  # 6 layers, 2 KV heads of 64
        assert result["kv_bytes"] == result["rows"] * 33 * 2 * 6 * 2 * 64 * 4
        assert result["aliased_bytes"] == result["pool_bytes"] == (1 + 3 * result["rows"]) * 16 * 2 * 6 * 2 * 64 * 4
        assert 0 < result["launch_ms"] <= result["ms"] and result["tokens_per_second"] > 0


def test_a_window_bounds_what_a_layer_reads():
    from jaxpaged.config import ModelConfig

    model = ModelConfig("gemma2", 64, 32, 48, 2, 4, 2, 8, 64, sliding_window=10, sliding_layers=(True, False))
    setup = bench_step.Setup(model, "float32", None, None, {}, 1.0)
    assert bench_step.kv_bytes_read(setup, rows=3, context=25) == 3 * (10 + 25) * 2 * 2 * 8 * 4
