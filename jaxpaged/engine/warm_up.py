"""Programs ahead of need: traced one after the other, which Python does, and compiled in threads, which it does not."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import jax

from jaxpaged.device.program_files import kept_programs
from jaxpaged.device.programs import PROGRAMS, made_here

logger = logging.getLogger("jaxpaged")

#: Programs that are compiled at once, at most: each takes memory, and XLA has threads of its own for one.
MAX_THREADS = 16

#: Told of programs that are ready and of how many are wanted.
Progress = Callable[[int, int], None]


class WarmUp(NamedTuple):
    """What a warm-up did."""

    compiled: int  # programs
    read: int  # programs that an earlier process had left in files
    seconds: float
    folder: Path | None  # in which the files are, if there are any
    folder_bytes: int


def no_progress(_done: int, _total: int) -> None:
    pass


class Watch:
    """The clock and the counters of a warm-up."""

    def __init__(self):
        self._began = time.perf_counter()
        self._made, self._read = PROGRAMS.num_made, PROGRAMS.num_read

    def result(self) -> WarmUp:
        read = PROGRAMS.num_read - self._read
        compiled = PROGRAMS.num_made - self._made - read
        return WarmUp(compiled, read, time.perf_counter() - self._began, *(kept_programs() or (None, 0)))


def compile_together(programs: Iterable[jax.stages.Lowered], total: int, progress: Progress = no_progress) -> None:
    """Compile programs in as many threads as there are cores, while the next ones are traced; `total` is their number.

    The jitted functions that they were lowered from find them.
    """
    num_threads = min(os.cpu_count() or 1, MAX_THREADS)
    threads = ThreadPoolExecutor(num_threads, thread_name_prefix="compile")
    progress(0, total)
    try:
        for done, _ in enumerate(_compiled(programs, threads, most=2 * num_threads), start=1):
            progress(done, total)
            logger.info("programs: %d of %d are ready", done, total)
    finally:
        threads.shutdown(cancel_futures=True)


def _compiled(programs: Iterable[jax.stages.Lowered], threads: ThreadPoolExecutor, most: int) -> Iterator[None]:
    """Yields for each when it is ready; `most` wait or are compiled, since what is traced takes memory."""
    pending: set[Future[tuple[int, int]]] = set()
    for program in programs:
        pending.add(threads.submit(_made_by, program))
        while len(pending) >= most:
            pending = yield from _take(pending)
    while pending:
        pending = yield from _take(pending)


def _take(pending: set[Future[tuple[int, int]]]) -> Generator[None, None, set[Future[tuple[int, int]]]]:
    done, pending = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        _note(future)
        yield
    return pending


def _note(future: Future[tuple[int, int]]) -> None:
    made, num_read = future.result()
    if made:
        PROGRAMS.note_made(made, num_read)


class CompiledBeside:
    """Programs of one step that are compiled while the caller goes on, until he needs them."""

    def __init__(self, what: Hashable, programs: list[jax.stages.Lowered]):
        self.what = what
        threads = ThreadPoolExecutor(len(programs), thread_name_prefix="compile")
        self._pending = [threads.submit(_made_by, program) for program in programs]
        threads.shutdown(wait=False)

    def wait(self) -> None:
        """Until all are ready; and count them now, not when a thread has made one that nobody may ask for."""
        for future in self._pending:
            _note(future)
        self._pending = []


def _made_by(program: jax.stages.Lowered) -> tuple[int, int]:
    """Programs made, and those that were read, by compiling one."""
    before = made_here()
    program.compile()
    after = made_here()
    return after[0] - before[0], after[1] - before[1]
