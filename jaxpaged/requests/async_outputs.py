"""Runs for `async for`: each is driven by a thread of its own, one after the other, and its results go to the loop.

Who reads does not drive the run: results wait in the loop's queue, and a run that stands behind another gets its turn
whether or not somebody reads that one's results.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, suppress
from typing import Any, Generic, TypeVar

T = TypeVar("T")

#: How often one that waits for its turn looks whether it is still wanted.
LOOK_SECONDS = 0.05


class _Run:
    """What an iterator and its thread both know. They have no other tie: an iterator that is dropped ends its run."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.is_stopped = False  # a plain value, since it is set wherever an iterator is dropped
        self.reason: Exception | None = None  # of whoever stopped it, for who still waits for a result

    @property
    def is_wanted(self) -> bool:
        return not self.is_stopped and not self.loop.is_closed()


class _End:
    """The last of what a thread sends."""

    def __init__(self, error: BaseException | None = None):
        self.error = error


class AsyncRuns:
    """The runs of one LLM that are not over, first come, first served."""

    def __init__(self):
        self._runs: list[_Run] = []
        self._changed = threading.Condition()
        self._own = threading.local()  # the run of a thread

    def drive(self, run: _Run, steps: Callable[[], Generator[Iterable[T], None, None]], send: Any) -> None:
        """In a thread: when its turn has come, take steps until they end or nobody wants them; send what they yield."""
        self._own.run, error = run, None
        try:
            if self._has_turn(run):
                with closing(steps()) as taken:
                    for results in taken:
                        for result in results:
                            run.loop.call_soon_threadsafe(send, result)
                        if not run.is_wanted:
                            break
        except BaseException as raised:  # is raised where the results are waited for
            error = raised
        with self._changed:
            self._runs.remove(run)
            self._changed.notify_all()
        with suppress(RuntimeError):  # the loop is closed, and nobody waits
            run.loop.call_soon_threadsafe(send, _End(error or run.reason))

    def add(self, run: _Run) -> None:
        with self._changed:
            self._runs.append(run)

    def settle(self) -> None:
        """Wait for the runs that nobody wants any more, which takes a step: then nothing is left of them."""
        own = getattr(self._own, "run", None)

        def are_settled() -> bool:
            return all(run.is_wanted or run is own for run in tuple(self._runs))

        if not are_settled():
            with self._changed:
                self._changed.wait_for(are_settled)

    def stop_all(self, reason: Exception) -> None:
        for run in tuple(self._runs):
            run.reason, run.is_stopped = reason, True
        self.settle()

    def _has_turn(self, run: _Run) -> bool:
        with self._changed:
            while run.is_wanted and self._runs[0] is not run:
                self._changed.wait(LOOK_SECONDS)
        return run.is_wanted


class AsyncOutputs(Generic[T]):
    """The results of a run as they finish, for `async for` in an asyncio loop.

    The run begins with the first result that is asked for. It ends with its last one, with `aclose`, where waiting for
    a result is cancelled, and where the iterator is dropped, as by `break`: after the step that runs then, the pool is
    free.
    """

    def __init__(self, runs: AsyncRuns, steps: Callable[[], Generator[Iterable[T], None, None]]):
        self._runs = runs
        self._steps = steps
        self._run: _Run | None = None
        self._results: asyncio.Queue[T | _End] = asyncio.Queue()
        self._is_over = False  # there is no further result

    def __aiter__(self) -> AsyncOutputs[T]:
        return self

    async def __anext__(self) -> T:
        if self._is_over:
            raise StopAsyncIteration
        if self._run is None:
            self._begin()
        try:
            result = await self._results.get()
        except BaseException:  # cancelled
            self._stop()
            raise
        if not isinstance(result, _End):
            return result
        self._is_over = True
        self._results.put_nowait(_End())  # for all others who wait
        if result.error is not None:
            raise result.error
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the run; when this returns, its pages are free."""
        self._stop()
        while self._run is not None:
            if isinstance(await self._results.get(), _End):
                self._results.put_nowait(_End())
                return

    def __del__(self):
        self._stop()

    def _stop(self) -> None:
        self._is_over = True
        if self._run is not None:
            self._run.is_stopped = True

    def _begin(self) -> None:
        self._run = run = _Run(asyncio.get_running_loop())
        self._runs.add(run)
        what = run, self._steps, self._results.put_nowait
        threading.Thread(target=self._runs.drive, args=what, name="agenerate").start()
