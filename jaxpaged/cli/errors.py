"""How a command says that it cannot run as given: one line on standard error, and an exit code."""

from __future__ import annotations

from contextlib import contextmanager

#: Exit codes; the last two are what a shell makes of SIGINT and SIGPIPE.
USAGE, INTERRUPTED, READER_GONE = 2, 130, 141


class UsageError(Exception):
    """The command cannot run as given; the text is what the user reads."""


@contextmanager
def usage_errors(what: str = "", kinds: tuple[type[Exception], ...] = (ValueError, OSError)):
    """Turn errors of the user's input into the one line that `main` prints."""
    try:
        yield
    except BrokenPipeError:
        raise
    except kinds as error:
        raise UsageError(what + reason(error)) from error


def reason(error: Exception) -> str:
    """An exception in one line."""
    if isinstance(error, OSError) and error.strerror is not None:
        return one_line(f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror)
    return one_line(str(error))


def one_line(text: str) -> str:
    return " ".join(text.split())
