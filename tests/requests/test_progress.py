"""The bar: on a terminal it says requests, tokens per second and the pool's use; elsewhere it says nothing."""

import io
import sys
from types import SimpleNamespace

from jaxpaged.requests.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stream, **options):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    run = SimpleNamespace(num_generated_tokens=1200, tokens_per_second=345.6, pool_used=0.25, cached_share=0.4)
    with ProgressBar(8, lambda: run, **options) as bar:
        bar.update(3)
    return stream.getvalue()


def test_a_terminal_sees_requests_tokens_per_second_and_the_pools_use(monkeypatch):
    text = shown(monkeypatch, Terminal(), done=2)
    for part in ("5/8", "1,200 tokens", "346 tokens/s", "25%", "cached 40%"):
        assert part in text


def test_a_pipe_sees_nothing(monkeypatch):
    assert shown(monkeypatch, io.StringIO()) == ""


def test_a_bar_that_is_switched_off_shows_nothing(monkeypatch):
    assert shown(monkeypatch, Terminal(), enabled=False) == ""


def test_a_label_says_which_run_it_is(monkeypatch):
    assert "contiguous-max" in shown(monkeypatch, Terminal(), label="contiguous-max")
