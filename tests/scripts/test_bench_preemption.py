"""scripts/bench/preemption.py times both ways at every page size, against floors, and fits the device."""

from __future__ import annotations

import json

import preemption as bench
import pytest
from paths import ROOT

MODEL = str(ROOT / "checkpoints" / "tiny-python")


@pytest.mark.slow
def test_the_last_line_has_the_card_and_every_row(capsys, monkeypatch):
    monkeypatch.setattr(bench, "LINK_BYTES", 1 << 20)
    monkeypatch.setitem(bench.MATRIX_ROWS, "cpu", 64)
    options = ["--tokens", "64", "128", "--page-sizes", "16", "64", "--repeats", "2", "--dtype", "float32"]
    assert bench.main([MODEL, *options, "--page-by-page"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["kv_bytes_per_token"] == 2 * 6 * 2 * 64 * 4
    rows = {(row["page_size"], row["tokens"]): row for row in report["results"]}
    assert {key: row["pages"] for key, row in rows.items()} == {(16, 64): 4, (16, 128): 8, (64, 64): 1, (64, 128): 2}
    assert [rows[16, 128][name] for name in ("transfers", "single_transfers")] == [2, 8]
    for (page_size, tokens), row in rows.items():
        assert row["swap_ms"] == pytest.approx(row["out_ms"] + row["in_ms"], abs=1e-3) and row["out_ms"] > 0
        assert ("recompute_ms" in row) == (tokens == 64 or page_size == 16)
        assert row["swap_floor_ms"] > 0 and row["auto"] == "swap"  # on a CPU arithmetic is dear


def test_what_does_not_fit_is_refused_before_anything_is_allocated(monkeypatch):
    with pytest.raises(SystemExit, match="this model has 1024 positions"):
        bench.main([MODEL, "--tokens", "2048"])
    monkeypatch.setattr(bench, "device_memory", lambda _: (1 << 29, "this machine"))
    with pytest.raises(SystemExit, match="take 0.6 GB, this machine has 0.5 GB: choose a smaller model"):
        bench.main([MODEL, "--tokens", "64"])
