"""Programs ahead of need, compiled in threads: all that requests of a kind can ask for, or those that a run will."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from jaxpaged.device.lowering_workers import LOWERING
from jaxpaged.device.program_files import kept_programs
from jaxpaged.device.programs import PROGRAMS, ProgramToMake

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

    def with_others(self, others: SequenceOf[WarmUp]) -> WarmUp:
        """This one, and those of other engines behind it."""
        every = [self, *others]
        compiled, read, seconds = (sum(getattr(one, name) for one in every) for name in ("compiled", "read", "seconds"))
        return every[-1]._replace(compiled=compiled, read=read, seconds=seconds)


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


def compile_together(programs: SequenceOf[ProgramToMake], progress: Progress = no_progress) -> None:
    """Compile programs in as many threads as there are cores; the first ones first."""
    ahead = Ahead(programs)
    try:
        progress(0, len(programs))
        for done, program in enumerate(as_completed(ahead.pending), start=1):
            program.result()
            progress(done, len(programs))
            logger.info("programs: %d of %d are ready", done, len(programs))
    finally:
        ahead.stop()


class Ahead:
    """Programs that are compiled while the caller goes on, the likeliest first.

    Who needs one of them waits for it, if a thread has begun it, or compiles it himself; what fails here fails for him,
    too, so nobody has to ask for results.
    """

    def __init__(self, programs: SequenceOf[ProgramToMake]):
        num_threads = max(1, min(os.cpu_count() or 1, MAX_THREADS, len(programs)))
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="compile")
        self._workers = contextlib.ExitStack()
        if programs:  # the last of them ends what is begun here
            self._workers.enter_context(LOWERING.running(len(programs)))
        self._left, self._lock = len(programs), threading.Lock()
        self.pending = [self._threads.submit(program.compile_ahead) for program in programs]
        for one in self.pending:
            one.add_done_callback(self._note_done)
        self._threads.shutdown(wait=False)

    def stop(self) -> bool:
        """What no thread has begun is not compiled; whether there was such."""
        return any([one.cancel() for one in self.pending])

    def _note_done(self, _one: Future[Any]) -> None:
        with self._lock:
            self._left -= 1
            is_last = not self._left
        if is_last:
            self._workers.close()
