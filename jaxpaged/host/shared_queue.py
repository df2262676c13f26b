"""One queue of requests for several engines, which run in threads of their own.

Whoever has nobody left that waits takes some more, so a fast engine takes more than a slow one, and no request stands
in line behind a long one while another engine is idle. What an engine takes at once is no more than its part of what is
left, nor than a step computes: the end of a run is shared, too.
"""

from __future__ import annotations

import threading
from collections import deque

from jaxpaged.config import EngineConfig
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.host.sequence import SequenceGroup

#: Seconds after which an engine without work looks again, whether anyone has stopped the run.
LONGEST_PAUSE = 0.05


class SharedQueue:
    """Groups in the order of their arrival, for so many engines of the same limits."""

    def __init__(self, groups: list[SequenceGroup], num_engines: int, limits: EngineConfig):
        self._coming = deque(sorted(groups, key=lambda group: group.arrival_time))
        self._num_engines = num_engines
        self._limits = limits
        self._lock = threading.Lock()
        #: What each engine begins with: dealt out before any of them runs, or the first would have all of a small run.
        self._dealt = [self._deal(0.0, 0, num_engines - i) for i in range(num_engines)]

    def __len__(self) -> int:
        return len(self._coming)

    def first_of(self, engine: int) -> list[SequenceGroup]:
        dealt, self._dealt[engine] = self._dealt[engine], []
        return dealt

    def take(self, now: float, num_running: int) -> list[SequenceGroup]:
        """Some that have arrived, for an engine in which so many sequences run and nobody waits."""
        with self._lock:
            return self._deal(now, num_running, self._num_engines)

    def seconds_to_next(self, now: float) -> float:
        with self._lock:
            until = self._coming[0].arrival_time - now if self._coming else 0.0
        return min(max(0.0, until), LONGEST_PAUSE)

    def _deal(self, now: float, num_running: int, num_engines: int) -> list[SequenceGroup]:
        taken: list[SequenceGroup] = []
        most, num_tokens = -(-len(self._coming) // num_engines), 0
        while self._coming and self._coming[0].arrival_time <= now and len(taken) < most:
            group = self._coming[0]
            num_running += group.params.num_samples
            num_tokens += group.prompt_len
            has_room = num_running <= self._limits.max_num_seqs and num_tokens <= self._limits.max_num_batched_tokens
            if not has_room and (taken or num_running > group.params.num_samples):
                break
            taken.append(self._coming.popleft())
        return taken


class SharedArrivals:
    """One engine's view of the queue, in the form of `Arrivals`."""

    def __init__(self, queue: SharedQueue, engine: int, scheduler: Scheduler):
        self._queue = queue
        self._scheduler = scheduler
        self._first = queue.first_of(engine)
        #: All that will ever come to this engine, if that is known; else none.
        self.known = [] if len(queue) else self._first

    def __bool__(self) -> bool:
        return bool(self._first or len(self._queue))

    def take(self, now: float) -> list[SequenceGroup]:
        first, self._first = self._first, []
        if first or self._scheduler.waiting:
            return first
        return self._queue.take(now, len(self._scheduler.tables))

    def seconds_to_next(self, now: float) -> float:
        return self._queue.seconds_to_next(now)
