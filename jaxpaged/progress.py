"""The bar on a terminal while requests run. In a pipe, a log file or a notebook it prints nothing."""

from __future__ import annotations

import sys
from typing import Any


class ProgressBar:
    """Requests done, tokens per second and the pool's use, on standard error; use as a context manager."""

    def __init__(self, total_requests: int, done: int = 0, enabled: bool = True):
        self._bar: Any = None
        self._done_before = done  # by an earlier run that this one resumes
        if enabled and total_requests > 0 and sys.stderr.isatty():
            self._bar = _make_bar()
            self._task = self._bar.add_task("", total=total_requests, completed=done, tokens=0, rate=0.0, pool=0.0)

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, finished: int, generated_tokens: int, tokens_per_second: float, pool_used_fraction: float) -> None:
        """`finished` counts this run's requests; `pool_used_fraction` is in [0, 1]."""
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=self._done_before + finished,
                tokens=generated_tokens,
                rate=tokens_per_second,
                pool=pool_used_fraction,
            )


def _make_bar() -> Any:
    from rich.console import Console  # only where a bar is shown: it takes as long to import as `--help` to print
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("requests  {task.fields[tokens]:,} tokens  {task.fields[rate]:,.0f} tokens/s"),
        TextColumn("pool {task.fields[pool]:.0%}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        redirect_stdout=False,  # results are written to standard output as bytes
    )
