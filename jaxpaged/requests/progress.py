"""The bar on a terminal while requests run, and a line while programs are compiled. In a pipe, a log file or a notebook
they print nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

#: Columns of a bar, and of the terminals that have one.
MOST_BAR, LEAST_BAR, WITH_BAR = 40, 8, 60
#: The last column of a terminal makes some of them begin another line.
SPARE_COLUMNS = 1


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
    from rich.progress import Progress, ProgressColumn, Task
    from rich.progress_bar import ProgressBar as Bar
    from rich.table import Table
    from rich.text import Text

    console = Console(stderr=True)

    class RunColumn(ProgressColumn):
        """The whole line, as wide as the terminal is then."""

        def render(self, task: Task) -> Table:
            words, width = fitting(_parts(task, stats()), label, console.width)
            line = Table.grid()
            cells = [Bar(task.total, task.completed, width=width), " "] if width else []
            line.add_row(*cells, Text(words, no_wrap=True, overflow="crop"))
            return line

    return Progress(RunColumn(), console=console, redirect_stdout=False)  # results are written to it as bytes


def _parts(task: Any, run: Stats) -> list[tuple[int, str]]:
    """What the line says, from left to right, each with its rank: the last ones are left out where there is no room."""
    left = task.time_remaining
    return [
        (0, f"{task.completed:,.0f}/{task.total:,.0f}"),
        (5, "requests"),
        (4, f"{run.num_generated_tokens:,} tokens"),
        (1, f"{run.tokens_per_second:,.0f} tokens/s"),
        (3, f"pool {run.pool_used:.0%}"),
        *([(6, f"cached {run.cached_share:.0%}")] if run.cached_share else []),  # of the prompts' tokens
        (7, _clock(task.elapsed or 0)),
        (2, f"{'?' if left is None else _clock(left)} left"),
    ]


def fitting(parts: list[tuple[int, str]], label: str, width: int) -> tuple[str, int]:
    """As much of the line as fits, and the columns of the bar before it: none where there are few."""
    least_bar = LEAST_BAR if width >= WITH_BAR else 0
    room = width - SPARE_COLUMNS - (least_bar + 1 if least_bar else 0)
    kept = {0}
    if len(_line(parts, kept, label)) > room:
        label = ""
    for rank, _ in sorted(parts):
        if len(_line(parts, kept | {rank}, label)) <= room:
            kept.add(rank)
    line = _line(parts, kept, label)
    return line, min(MOST_BAR, least_bar + room - len(line)) if least_bar else 0


def _line(parts: list[tuple[int, str]], kept: set[int], label: str) -> str:
    return "  ".join(filter(None, [label, *(text for rank, text in parts if rank in kept)])).replace("  req", " req")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
