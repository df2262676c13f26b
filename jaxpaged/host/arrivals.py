"""Requests that come over time: which of them are there, and how long until the next is.

The engine asks between steps, by its own clock, so a request is queued at the first step that starts after its arrival.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

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


def set_arrivals(groups: list[SequenceGroup], times: Sequence[float] | None) -> None:
    """Give each group its time, in seconds since the run begins; None leaves all at its start."""
    if times is None:
        return
    times = read_list("arrival_times", times, "seconds")
    if len(times) != len(groups):
        raise ValueError(f"{len(times)} arrival_times for {len(groups)} prompts: give one for each prompt")
    seconds = [as_number(time) for time in times]
    for given, time in zip(times, seconds, strict=True):
        if time is None or not 0 <= time < math.inf:
            raise ValueError(f"an arrival time must be seconds from 0 on, got {shortened(given)}")
    for group, time in zip(groups, seconds, strict=True):
        group.arrival_time = float(time)  # type: ignore[arg-type]
