"""Several engines of one model, each on devices of its own, that run one set of requests together.

Each has a thread; they take requests from one queue and hand the finished ones to the caller's thread. The first error
of any of them, or an interrupt of the caller, stops all: each ends the step that it is in, and leaves its pool as a run
that was left early does.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import closing

from jaxpaged.engine.engine import Engine, Groups
from jaxpaged.host.ownership import Hold
from jaxpaged.host.sequence import SequenceGroup
from jaxpaged.host.shared_queue import SharedQueue


def run_together(engines: Sequence[Engine], groups: Groups, hold: Hold) -> Generator[list[SequenceGroup], None, None]:
    """As `Engine.run_steps` of one engine, by all of them: what each step of any has finished, often nothing. What they
    are given to hold is one pool to everyone else."""
    # Groups that are read while others run are one queue already.
    shared = SharedQueue(groups, len(engines), engines[0].limits) if isinstance(groups, list) else None
    finished: queue.SimpleQueue[list[SequenceGroup] | BaseException | None] = queue.SimpleQueue()
    is_over = threading.Event()
    is_ending = sys.is_finalizing  # by then the threads have ended, and modules have no names

    def run(number: int, engine: Engine) -> None:
        try:
            share = None if shared is None else (shared, number)
            with closing(engine.run_steps(groups, hold, share)) as steps_taken:
                for some in steps_taken:
                    finished.put(some)
                    # Python ends by waiting for threads: a run that is open by then is over, too.
                    if is_over.is_set() or not threading.main_thread().is_alive():
                        return
            finished.put(None)
        except BaseException as error:  # whatever it is, it is the caller's: he waits for all engines
            finished.put(error)

    threads = [threading.Thread(target=run, args=(i, engine), name=f"engine {i}") for i, engine in enumerate(engines)]
    try:
        for thread in threads:
            thread.start()
        num_running = len(threads)
        while num_running:
            some = finished.get()
            if isinstance(some, BaseException):
                raise some
            if some is None:
                num_running -= 1
            else:
                yield some
    finally:
        is_over.set()
        for thread in threads:
            if thread.ident is not None and not is_ending():
                thread.join()
