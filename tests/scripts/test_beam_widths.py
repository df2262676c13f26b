"""scripts/make/beam_widths.py: wider beams find likelier continuations; functions are judged as in evaluate_tiny.py."""

from __future__ import annotations

import json
from types import SimpleNamespace

import beam_widths
import pytest
from paths import ROOT


def test_a_function_ends_at_the_first_line_in_column_0():
    texts = ["    return 1\nprint(", "    return 1\nclass", "    return (\n"]
    output = SimpleNamespace(outputs=[SimpleNamespace(text=text) for text in texts])
    assert beam_widths.judge("def f():\n", output) == ([True, True, False], 2)


@pytest.mark.slow
def test_the_table_has_a_row_for_each_width_and_is_drawn(capsys, tmp_path):
    options = ["--widths", "1", "4", "--prompts", "3", "--max-tokens", "8", "--plot", str(tmp_path / "widths.png")]
    assert beam_widths.main([str(ROOT / "checkpoints" / "tiny-python"), *options]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    narrow, wide = report["widths"]
    assert (narrow["width"], wide["width"], report["prompts"]) == (1, 4, 3)
    assert narrow["better"] == 0 and wide["logprob"] >= narrow["logprob"]
    assert narrow["distinct"] == 1 and narrow["any"] == narrow["valid"]
    assert (tmp_path / "widths.png").stat().st_size > 1000
