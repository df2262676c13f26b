"""What is taken down of a run while it runs: its statistics, when its requests got on, and a trace if one is wanted."""

from __future__ import annotations

import time

from jaxpaged.config import CacheConfig
from jaxpaged.host.account.accounting import RunStats
from jaxpaged.host.account.trace import TraceRecorder
from jaxpaged.host.pages.swap import Swap
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.host.sequence import SequenceGroup
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.host.step.step_plan import StepPlan


class RunRecord:
    """The record of one run, and what its requests ask of a step, in sum. Times are seconds since it began.

    Of each step it is told, in this order: `begin_step`, `planned`, `packed`, `moved` (swaps are done), `arrived` (the
    device's results are there), `committed`.
    """

    def __init__(
        self, cache: CacheConfig, features: SamplingFeatures, page_bytes: int = 0, trace: TraceRecorder | None = None
    ):
        self.features = features
        self.stats = RunStats.for_cache(cache)
        self._trace = trace
        self._page_bytes = page_bytes
        self._began = time.perf_counter()
        self._marks: list[float] = []  # of this step

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def add_requests(self, groups: list[SequenceGroup]) -> None:
        self.stats.num_requests = len(groups)
        self.stats.num_prompt_tokens = sum(group.prompt_len for group in groups)

    def begin_step(self) -> None:
        self._marks = [self.seconds]

    def planned(self, plan: StepPlan, scheduler: Scheduler) -> None:
        self._mark()
        if self._trace is not None:
            self._trace.planned(plan, scheduler)
        self.stats.record(plan, scheduler)

    def packed(self) -> None:
        self._mark()

    def moved(self, swaps: list[Swap]) -> None:
        self._mark()
        for one in swaps:
            self.stats.add_swap(one, len(one.page_ids) * self._page_bytes)

    def arrived(self) -> None:
        self._mark()

    def committed(self, plan: StepPlan, finished: list[SequenceGroup], scheduler: Scheduler) -> None:
        if self._trace is not None:
            self._trace.committed(scheduler)
        began, planned, packed, moved, arrived = self._marks
        _note_times(plan, finished, planned, arrived)
        ended = self.seconds
        self.stats.add_seconds(planned - began, arrived - packed, ended - began)
        self.stats.add_times(began, ended)
        self.stats.add_preemption_seconds(plan, moved - packed, arrived - moved)

    def _mark(self) -> None:
        self._marks.append(self.seconds)


def _note_times(plan: StepPlan, finished: list[SequenceGroup], planned: float, done: float) -> None:
    if plan.is_prefill:
        for row in plan.rows:
            if row.group.first_scheduled_time < 0:
                row.group.first_scheduled_time = planned
        for sample in plan.samples:
            if sample.group.first_token_time < 0:
                sample.group.first_token_time = done
    for group in finished:
        group.finished_time = done
