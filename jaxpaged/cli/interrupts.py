"""Control-C that ends the process at once, with a word and an exit code.

A KeyboardInterrupt is raised wherever Python happens to be: in a callback of jax, or of an import, it would be printed
with its traceback and forgotten.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from jaxpaged.cli.errors import INTERRUPTED

STDERR = 2


@contextmanager
def exit_at_interrupt(remedy: str = "") -> Iterator[None]:
    """Within the block Control-C acts as `kill -9` does, but for a word, which `remedy` adds to, and the exit code."""
    if threading.current_thread() is not threading.main_thread():  # where no signal comes
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: leave(remedy=remedy))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def noted_interrupt() -> Iterator[threading.Event]:
    """Within the block Control-C sets the event, for who looks at it between two steps; the second ends the process."""
    pressed = threading.Event()

    def note(*_: object) -> None:
        if pressed.is_set():
            leave()
        pressed.set()

    if threading.current_thread() is not threading.main_thread():  # where no signal comes
        yield pressed
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def leave(_signal_number: int = 0, _frame: object = None, remedy: str = "") -> None:
    """End the process, as a handler of the signal; nothing that Python would still do is done."""
    show_cursor = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # the progress bar hides it
    said = f"jaxpaged: interrupted{remedy}"
    in_form = getattr(sys.stderr, "line_of", "{}\n".format)  # of lines of JSON (json_log.py)
    os.write(STDERR, f"{show_cursor}{in_form(said)}".encode())
    os._exit(INTERRUPTED)
