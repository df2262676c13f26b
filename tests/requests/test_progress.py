"""The bar: on a terminal it says requests, tokens per second and the pool's use; elsewhere it says nothing."""

import io
import re
import sys
from types import SimpleNamespace

import pytest

from jaxpaged.requests.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


FEW = SimpleNamespace(num_generated_tokens=1200, tokens_per_second=345.6, pool_used=0.25, cached_share=0.4)
MANY = SimpleNamespace(num_generated_tokens=1_234_567_890, tokens_per_second=98_765, pool_used=1.0, cached_share=0.99)


def shown(monkeypatch, stream, columns=120, run=FEW, total=8, finished=3, **options):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    with ProgressBar(total, lambda: run, **options) as bar:
        bar.update(finished)
    return stream.getvalue()


def drawn(text):
    """The last line that a terminal shows of it."""
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "\n")
    return [line for line in plain.split("\n") if line.strip()][-1]


def test_a_terminal_sees_requests_tokens_per_second_and_the_pools_use(monkeypatch):
    text = shown(monkeypatch, Terminal(), done=2)
    for part in ("5/8 requests", "1,200 tokens", "346 tokens/s", "25%", "cached 40%", "━━━━", " left"):
        assert part in text


@pytest.mark.parametrize("columns, parts", [(80, ("requests", "1,200 tokens")), (60, ())])
def test_the_line_fits_the_terminal_and_says_what_matters_most(monkeypatch, columns, parts):
    line = drawn(shown(monkeypatch, Terminal(), columns))
    for part in ("3/8", "346 tokens/s", "pool 25%", " left", "━━━", *parts):
        assert part in line
    assert len(line.rstrip()) < columns


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 100, 200])
@pytest.mark.parametrize("label", ["", "dense-static-global"])
def test_the_line_fits_whatever_the_numbers(monkeypatch, columns, label):
    line = drawn(shown(monkeypatch, Terminal(), columns, MANY, 1_000_000, 999_999, label=label))
    assert len(line.rstrip()) < columns
    assert "999,999/1,000,000" in line
    assert label in line or columns < 60


def test_a_pipe_sees_nothing(monkeypatch):
    assert shown(monkeypatch, io.StringIO()) == ""


def test_a_bar_that_is_switched_off_shows_nothing(monkeypatch):
    assert shown(monkeypatch, Terminal(), enabled=False) == ""


def test_a_label_says_which_run_it_is(monkeypatch):
    assert "contiguous-max" in shown(monkeypatch, Terminal(), label="contiguous-max")
