"""Requests that come over time: which of them are there, and how long until the next is. And those that come when
there is room for them.

The engine asks between steps, by its own clock, so a request is queued at the first step that starts after its arrival.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from threading import Lock
from time import monotonic
from typing import Protocol

from jaxpaged.api.values import as_number, read_list, shortened
from jaxpaged.host.sequence import SequenceGroup


class Arrivals:
    """Groups in the order of `arrival_time`, those of one time in the order given."""

    def __init__(self, groups: list[SequenceGroup]):
        self._coming = deque(sorted(groups, key=lambda group: group.arrival_time))

    def __bool__(self) -> bool:
        """Whether any group is still to come."""
        return bool(self._coming)

    def take(self, now: float) -> list[SequenceGroup]:
        """Those that have arrived since the last call. `now`: seconds since the run began."""
        arrived = []
        while self._coming and self._coming[0].arrival_time <= now:
            arrived.append(self._coming.popleft())
        return arrived

    def seconds_to_next(self, now: float) -> float:
        """Until the next one arrives; 0 where it is there."""
        return max(0.0, self._coming[0].arrival_time - now)


class GroupReader(Protocol):
    """Makes groups of prompts as these are read."""

    error: ValueError | None  # why there are no more, though the prompts are not at their end

    def read(self) -> SequenceGroup | None:
        """The next one; None behind the last."""
        ...


class StreamedGroups:
    """Groups that are read while others run.

    A source may be slow. So reading ends for now when it has taken `LONGEST_READ` seconds, and while others run no more
    than half of the time is spent on it.
    """

    LONGEST_READ = 0.05

    def __init__(self, reader: GroupReader, examples: list[SequenceGroup]):
        """`examples`: groups that ask for all that those which come will ask for; they do not run."""
        self.examples = examples
        self._reader = reader
        self._is_over = False
        self._next_read = 0.0  # by the clock of `time.monotonic`
        self._lock = Lock()  # of several engines one reads, and others go on meanwhile, if they have work

    def __bool__(self) -> bool:
        """Whether any group may still come."""
        return not self._is_over

    @property
    def error(self) -> ValueError | None:
        return self._reader.error

    def take(self, room: int, is_idle: bool) -> list[SequenceGroup]:
        """So many at most, at least one if `is_idle`: nothing else runs. Fewer, or none, at the end."""
        if not self._lock.acquire(blocking=is_idle):
            return []
        try:
            return self._read(room, is_idle)
        finally:
            self._lock.release()

    def _read(self, room: int, is_idle: bool) -> list[SequenceGroup]:
        began = monotonic()
        if self._is_over or (not is_idle and began < self._next_read):
            return []
        taken: list[SequenceGroup] = []
        while len(taken) < room and (not taken or monotonic() - began < self.LONGEST_READ):
            group = self._reader.read()
            if group is None:
                self._is_over = True
                break
            taken.append(group)
        ended = monotonic()
        self._next_read = ended + (ended - began)
        return taken


def set_arrivals(groups: list[SequenceGroup] | StreamedGroups, times: Sequence[float] | None) -> None:
    """Give each group its time, in seconds since the run begins; None leaves all at its start."""
    if times is None:
        return
    if isinstance(groups, StreamedGroups):
        raise ValueError("arrival_times are for a list of prompts: make one of them")
    times = read_list("arrival_times", times, "seconds")
    if len(times) != len(groups):
        raise ValueError(f"{len(times)} arrival_times for {len(groups)} prompts: give one for each prompt")
    seconds = [as_number(time) for time in times]
    for given, time in zip(times, seconds, strict=True):
        if time is None or not 0 <= time < math.inf:
            raise ValueError(f"an arrival time must be seconds from 0 on, got {shortened(given)}")
    for group, time in zip(groups, seconds, strict=True):
        group.arrival_time = float(time)  # type: ignore[arg-type]
