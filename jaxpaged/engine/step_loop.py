"""Decide, launch, learn, over and over: the next step is launched while the last one runs.

    device   | step 1      | step 2      | step 3      |
    host      decide 2      learn 1       learn 2
              launch 2      decide 3      decide 4
                            launch 3      launch 4

The device need not wait for the host: the tokens that it chose stay there, and the next step begins with them. What
the host must know to plan that step, it knows without these tokens (`Scheduler.foresee`). Where it does not, as where
beams end by their texts, or where a request has to give way, it learns first, and the device waits.
"""

from __future__ import annotations

from typing import NamedTuple

from jax.profiler import TraceAnnotation as phase  # costs a fraction of a microsecond where nobody profiles

from jaxpaged.engine.record import RunRecord, StepTimes
from jaxpaged.engine.runner import LaunchedStep, StepRunner
from jaxpaged.host.account.phases import COMMIT, FETCH, LAUNCH, PREPARE, SCHEDULE
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.host.sequence import SequenceGroup
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.host.step.logprobs import collect_logprobs
from jaxpaged.host.step.step_plan import StepPlan


class _InFlight(NamedTuple):
    plan: StepPlan
    launched: LaunchedStep
    times: StepTimes


class StepLoop:
    """Steps for whatever the scheduler has, for requests that ask for these `features`.

    `is_async`: launch the next step while one runs, wherever it can be planned.
    """

    def __init__(
        self, runner: StepRunner, scheduler: Scheduler, features: SamplingFeatures, record: RunRecord, is_async: bool
    ):
        self.scheduler = scheduler
        self.features = features
        self.record = record
        self._runner = runner
        self._is_async = is_async and not features.needs_tokens
        self._in_flight: _InFlight | None = None

    @property
    def has_work(self) -> bool:
        return self._in_flight is not None or self.scheduler.has_work

    def step(self) -> list[SequenceGroup]:
        """Learn what one step chose; returns the groups that it finished. The step after it is on its way by then, if
        it could be planned before."""
        self.record.resumed()
        current, self._in_flight = self._in_flight or self._launch(), None
        assert current is not None, "step() without work"
        following = None
        if self._is_async and self.scheduler.can_foresee(current.plan):
            self.scheduler.foresee(current.plan)
            following = self._launch(is_ahead=True)
        finished = self._learn(current, is_followed=following is not None)
        self._in_flight = following
        return finished

    def _launch(self, is_ahead: bool = False) -> _InFlight | None:
        times = self.record.begin_step()
        with phase(SCHEDULE):
            plan = self.scheduler.schedule(is_ahead)
        if plan is None:
            return None
        self.record.planned(times, plan, self.scheduler)
        with phase(PREPARE):
            step = self._runner.prepare(plan, self.features)
        times.packed = self.record.seconds
        for one in plan.swaps:
            self._runner.swap(one)
        self.record.moved(times, plan.swaps)
        with phase(LAUNCH):
            self._runner.copy_pages(step.copies_before)
            return _InFlight(plan, self._runner.launch(step), times)

    def _learn(self, step: _InFlight, is_followed: bool) -> list[SequenceGroup]:
        plan, launched, times = step
        with phase(FETCH):
            outputs = self._runner.fetch(launched)
        times.arrived = self.record.seconds
        with phase(COMMIT):
            collect_logprobs(plan, outputs)
            finished = self.scheduler.commit(plan, outputs)
        self.record.committed(times, plan, finished, self.scheduler, is_followed)
        return finished
