"""The line while programs are compiled: on a terminal alone, and gone when they are ready."""

from __future__ import annotations

import io
import sys

import pytest

from jaxpaged.requests.progress import CompilingLine


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "enabled", "text"),
    [
        (Terminal(), True, "\r\x1b[Kcompiling 1 of 2\r\x1b[Kcompiling 2 of 2\r\x1b[Kcompiling 2 of 2\r\x1b[K"),
        (Terminal(), False, ""),
        (io.StringIO(), True, ""),
    ],
)
def test_the_line_says_which_program_is_compiled(stream, enabled, text, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    with CompilingLine(enabled) as line:
        for done in range(3):
            line.update(done, 2)
    assert stream.getvalue() == text
