"""`--log-format json`: whatever a command says on standard error, as lines of JSON, each with its "event"."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, TextIO

NAME = "jaxpaged: "


class JsonLines(io.TextIOBase):
    """Stands for standard error: lines of text become messages, so that nothing that is written there is no JSON."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._lock = threading.Lock()
        self._begun = ""  # of a line

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line.strip():
                self._put(self.line_of(line))
        return len(text)

    def line_of(self, text: str) -> str:
        """What is written of a line of text."""
        return _event("message", message=text.removeprefix(NAME))

    def flush(self) -> None:
        self._stream.flush()

    def event(self, event: str, **values: Any) -> None:
        self._put(_event(event, **values))

    def _put(self, line: str) -> None:
        with self._lock:
            self._stream.write(line)
            self._stream.flush()


def _event(event: str, **values: Any) -> str:
    return json.dumps({"event": event, **values}, allow_nan=False) + "\n"


class EventHandler(logging.Handler):
    """Records of loggers as events."""

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(sys.stderr, JsonLines):
            sys.stderr.event("log", level=record.levelname, message=record.getMessage())


@contextmanager
def json_lines() -> Iterator[None]:
    """All that is said in the block, by loggers too."""
    handler, root = EventHandler(), logging.getLogger()
    root.addHandler(handler)
    try:
        with redirect_stderr(JsonLines(sys.stderr)):
            yield
            sys.stderr.write("\n")  # ends a line that was begun
    finally:
        root.removeHandler(handler)
