"""Our end of the process that renders chat templates (template_worker.py): started when it is first needed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

#: Of the processor, for one rendering, which takes a millisecond.
SECONDS = 5.0
WORKER = Path(__file__).with_name("template_worker.py")


class TemplateProcess:
    """Renders one template at a time, for any thread; a process that had to be killed is followed by another.

    It ends when this object does, or our process, however that ends: its input is then at an end.
    """

    def __init__(self, seconds: float = SECONDS):
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stop = lambda: None

    def render(self, source: str, variables: dict[str, Any]) -> str:
        """The text; ValueError in words for a template that is wrong, raises, or takes too much."""
        with self._lock:
            reply = self._ask(json.dumps({"source": source, "variables": variables}).encode() + b"\n")
        if "error" in reply:
            raise ValueError(f"the chat template {reply['error']}")
        return reply["text"]

    def close(self) -> None:
        with self._lock:
            self._end()

    def _ask(self, request: bytes) -> dict[str, str]:
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:  # an interrupt: the answer would be taken for that of the next question
            self._end()
            raise
        return json.loads(line) if line.endswith(b"\n") else {"error": self._reason(process)}

    def _reason(self, process: subprocess.Popen[bytes]) -> str:
        """Why there is no answer of the process, which has closed its output."""
        code = process.wait()
        self._end()
        if code == -signal.SIGPROF:
            return f"takes more than {self._seconds:g} s: it may loop for ever"
        return f"cannot be rendered: the process that does it ended with code {code} (it needs jinja2 3.1.6 or later)"

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: what lies beside the script is not imported for a module of Python.
        command = [sys.executable, "-P", str(WORKER), str(self._seconds)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._process = process
        self._stop = weakref.finalize(self, _kill, process, os.getpid())
        return process

    def _end(self) -> None:
        self._process = None
        self._stop()


def _kill(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:  # in a process that was forked off, whose parent may go on
        return
    assert process.stdin is not None and process.stdout is not None
    process.kill()
    process.wait()
    process.stdout.close()
    try:
        process.stdin.close()
    except BrokenPipeError:  # of a request that was not read
        pass
