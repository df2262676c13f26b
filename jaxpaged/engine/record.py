"""What is taken down of a run while it runs: its statistics, when its requests got on, and a trace if one is wanted."""

from __future__ import annotations

import time
from dataclasses import dataclass

from jaxpaged.config import CacheConfig
from jaxpaged.host.account.accounting import RunStats
from jaxpaged.host.account.trace import TraceRecorder
from jaxpaged.host.pages.swap import Swap
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.host.sequence import SequenceGroup
from jaxpaged.host.step.step_plan import StepPlan


@dataclass(slots=True)
class StepTimes:
    """When a step got on, in seconds since the run began."""

    began: float  # deciding
    planned: float = 0.0
    packed: float = 0.0  # its arrays are made
    moved: float = 0.0  # its swaps are done
    arrived: float = 0.0  # its results are on the host


class RunRecord:
    """The record of one run. Of each step it is told, in this order: `begin_step`, `planned`, `moved`, `committed`.

    Steps overlap, and what the caller does between two of them does not count. So time is shared out as it passes: what
    lies before `_accounted` has its place already.
    """

    def __init__(self, cache: CacheConfig, page_bytes: int = 0, trace: TraceRecorder | None = None):
        self.stats = RunStats.for_cache(cache)
        self._trace = trace
        self._page_bytes = page_bytes
        self._began = time.perf_counter()
        self._accounted = 0.0
        self._last_ended = 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def add_requests(self, groups: list[SequenceGroup]) -> None:
        self.stats.num_requests += len(groups)
        self.stats.num_prompt_tokens += sum(group.prompt_len for group in groups)

    def made(self, num_programs: int, num_read: int) -> None:
        """Programs that the run did not find and has waited for so far, and how many of them were read from files."""
        self.stats.compilations, self.stats.programs_read = num_programs - num_read, num_read

    def resumed(self) -> None:
        """The engine goes on, after the caller did something else."""
        self._accounted = self.seconds

    def begin_step(self) -> StepTimes:
        return StepTimes(self.seconds)

    def planned(self, times: StepTimes, plan: StepPlan, scheduler: Scheduler) -> None:
        times.planned = self.seconds
        if self._trace is not None:
            self._trace.planned(plan, scheduler)
        self.stats.record(plan, scheduler)

    def moved(self, times: StepTimes, swaps: list[Swap]) -> None:
        times.moved = self.seconds
        for one in swaps:
            self.stats.add_swap(one, len(one.page_ids) * self._page_bytes)

    def committed(
        self, times: StepTimes, plan: StepPlan, finished: list[SequenceGroup], scheduler: Scheduler, is_followed: bool
    ) -> None:
        """The step is over; where it `is_followed`, the device went on with the next one."""
        if self._trace is not None:
            self._trace.committed(scheduler)
        self.stats.add_tokens(plan)
        if is_followed:
            self.stats.correct(scheduler.tables_ahead)
        _note_times(plan, finished, times)
        ended = self.seconds
        began = max(times.began, self._accounted)
        busy_from, busy_until = max(times.packed, began), ended if is_followed else times.arrived
        schedule = max(0.0, times.planned - began)
        self.stats.add_seconds(schedule, max(0.0, busy_until - busy_from), ended - began)
        self.stats.add_times(max(times.began, self._last_ended), ended)
        swapped, launched = times.moved - times.packed, max(times.moved, began)
        self.stats.add_preemption_seconds(plan, swapped, max(0.0, times.arrived - launched))
        self._accounted = self._last_ended = ended


def _note_times(plan: StepPlan, finished: list[SequenceGroup], times: StepTimes) -> None:
    if plan.is_prefill:
        for row in plan.rows:
            if row.group.first_scheduled_time < 0:
                row.group.first_scheduled_time = times.planned
        for sample in plan.samples:
            if sample.group.first_token_time < 0:
                sample.group.first_token_time = times.arrived
    for group in finished:
        group.finished_time = times.arrived
