"""The bar on a terminal while requests run, and a line while programs are compiled. In a pipe, a log file or a notebook
they print nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol


class Stats(Protocol):
    """What the bar reads of a run (host/account/accounting.py, `RunStats`)."""

    num_generated_tokens: int

    @property
    def tokens_per_second(self) -> float: ...

    @property
    def pool_used(self) -> float: ...

    @property
    def cached_share(self) -> float: ...


class ProgressBar:
    """Requests done, tokens per second and the pool's use, on standard error; use as a context manager.

    `stats` is asked whenever the bar is drawn anew, so tokens and pool move while long requests run. `label` says
    which run it is, where there are several.
    """

    def __init__(
        self, total_requests: int, stats: Callable[[], Stats], done: int = 0, enabled: bool = True, label: str = ""
    ):
        self._bar: Any = None
        self._done_before = done  # by an earlier run that this one resumes
        if enabled and total_requests > 0 and sys.stderr.isatty():
            self._bar = _make_bar(stats, label)
            self._task = self._bar.add_task(label, total=total_requests, completed=done)

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, finished: int) -> None:
        """`finished` counts this run's requests."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done_before + finished)


class CompilingLine:
    """How many programs are ready, on standard error; use as a context manager."""

    def __init__(self, enabled: bool = True):
        self._is_shown = enabled and sys.stderr.isatty()

    def __enter__(self) -> CompilingLine:
        return self

    def __exit__(self, *_: object) -> None:
        self._write("")

    def update(self, done: int, total: int) -> None:
        """`done` of `total` programs are ready."""
        self._write(f"compiling {min(done + 1, total)} of {total}")

    def _write(self, text: str) -> None:
        if self._is_shown:
            sys.stderr.write(f"\r\033[K{text}")  # in place of what the line had
            sys.stderr.flush()


def _make_bar(stats: Callable[[], Stats], label: str) -> Any:
    from rich.console import Console  # only where a bar is shown: it takes as long to import as `--help` to print
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class RunColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            run = stats()
            tokens = f"requests  {run.num_generated_tokens:,} tokens  {run.tokens_per_second:,.0f} tokens/s"
            cached = f"  cached {run.cached_share:.0%}" if run.cached_share else ""  # of the prompts' tokens
            return Text(f"{tokens}  pool {run.pool_used:.0%}{cached}")

    return Progress(
        *([TextColumn("{task.description}")] if label else []),
        BarColumn(),
        MofNCompleteColumn(),
        RunColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        redirect_stdout=False,  # results are written to standard output as bytes
    )
