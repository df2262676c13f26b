"""Prompts of admitted requests, computed first come, first served, in chunks that fill a step's budget of tokens.

The row that completes a prompt gives the first token of every sample, so the samples fork here, sharing all pages.
"""

from __future__ import annotations

from collections import deque

from jaxpaged.config import EngineConfig
from jaxpaged.host.pages.known_pages import KnownPages
from jaxpaged.host.pages.token_tree import SequencePlacement
from jaxpaged.host.sequence import Sequence, SequenceGroup, SequenceStatus
from jaxpaged.host.step.step_plan import PlanRow, Sample, StepPlan
from jaxpaged.host.systems.roles import Forks


class PrefillQueue:
    """Admitted sequences with tokens still to compute, in an order that fills shared pages before they are read."""

    def __init__(self, limits: EngineConfig, forks: Forks, known: KnownPages):
        self._limits = limits
        self._forks = forks
        self._known = known
        self._queue: deque[tuple[SequenceGroup, Sequence]] = deque()

    @property
    def has_work(self) -> bool:
        return bool(self._queue)

    @property
    def num_tokens(self) -> int:
        """Tokens still to compute."""
        return sum(sequence.num_tokens - sequence.num_computed for _, sequence in self._queue)

    def add(self, group: SequenceGroup, placements: list[SequencePlacement]) -> None:
        """Queue what the group's sequences do not share; there is memory for all of it."""
        for sequence, num_shared, num_to_compute, _ in placements:
            sequence.num_computed = num_shared
            if num_to_compute:
                self._queue.append((group, sequence))

    def drop(self, group: SequenceGroup) -> None:
        """Compute no more of a group that has ended."""
        self._queue = deque(item for item in self._queue if item[0] is not group)

    @property
    def sequences(self) -> set[Sequence]:
        return {sequence for _, sequence in self._queue}

    @property
    def groups(self) -> set[SequenceGroup]:
        return {group for group, _ in self._queue}

    def plan(self) -> StepPlan:
        """The next step of prefill alone; there must be work."""
        plan = StepPlan(is_prefill=True)
        self.fill(plan, self._limits.max_num_batched_tokens)
        return plan

    def fill(self, plan: StepPlan, budget: int) -> None:
        """Add so many tokens to the plan, first come, first served; there must be work."""
        num_samples = len(plan.samples)
        while self._queue and budget:
            group, sequence = self._queue[0]
            start, length = sequence.num_computed, group.num_to_prefill(sequence)
            count = min(budget, self._move_on(group, sequence, start, length) - start)
            if not plan.is_mixed and plan.listed and (count == 1) != (plan.listed[0].count == 1):
                break  # one token a row is a decode step (batching.py): among longer rows it costs many times more
            is_last = start + count == length
            num_samples += _num_first_samples(group) if is_last else 0
            if num_samples > self._limits.max_num_seqs:
                break
            _plan_row(plan, group, sequence, start, count)
            self._note_known(group, sequence, start, start + count, length)
            budget -= count
            if not is_last:
                break
            self._queue.popleft()
            self._plan_first_samples(plan, group, sequence)

    def _move_on(self, group: SequenceGroup, sequence: Sequence, start: int, length: int) -> int:
        """The sequence goes on at `start`; returns the positions, of the `length` to compute, that it has pages for."""
        window, table = self._forks.window, sequence.table
        if window is None or group.is_prefix:
            return length
        if table.num_slots < length:  # what it gives back now can be found, and not before (window.py)
            size = self._forks.page_size
            self._known.add_computed(group, sequence, table.num_gone * size, window.num_unread(start) * size)
        window.move_on(table, start, length)
        return min(length, table.num_slots)

    def _note_known(self, group: SequenceGroup, sequence: Sequence, start: int, stop: int, length: int) -> None:
        """Positions from `start` to `stop` are planned; with them those that could not be found before, if any."""
        if self._forks.window is not None and not group.is_prefix:
            if sequence.table.num_slots < length:
                return
            start = sequence.table.num_gone * self._forks.page_size
        self._known.add_computed(group, sequence, start, stop)

    def _plan_first_samples(self, plan: StepPlan, group: SequenceGroup, sequence: Sequence) -> None:
        """The last planned row completes a prompt: choose the first token of every sample from it."""
        row = len(plan.listed) - 1
        if group.is_prefix or (group.beams and group.is_forked):
            return
        plan.samples.append(Sample(group, sequence, row))
        if group.is_forked or group.beams:
            return
        for index in range(1, group.params.num_samples):
            sample = Sequence(
                index, sequence.token_ids[:], sequence.prompt_len, self._forks.fork(sequence.table),
                sequence.num_computed, sequence.num_once_computed, SequenceStatus.RUNNING,
                stream=group.make_stream() if group.make_stream else None,
                place=group.limit.begin() if group.limit else None, page_hashes=sequence.page_hashes[:],
            )  # fmt: skip
            group.sequences.append(sample)
            plan.samples.append(Sample(group, sample, row))
        self._forks.settle(group)
        group.record_pages()


def _num_first_samples(group: SequenceGroup) -> int:
    """Samples that the end of a prefill gives: beams choose from one row, and those that come back from none."""
    if group.is_prefix:
        return 0
    if group.beams:
        return 0 if group.is_forked else 1
    return 1 if group.is_forked else group.params.num_samples


def _plan_row(plan: StepPlan, group: SequenceGroup, sequence: Sequence, start: int, count: int) -> None:
    plan.listed.append(PlanRow(group, sequence, start, count))
    sequence.num_computed = start + count
    num_recomputed = max(0, min(sequence.num_computed, sequence.num_once_computed) - start)
    group.recomputed_tokens += num_recomputed
    plan.num_recomputed += num_recomputed
    sequence.num_once_computed = max(sequence.num_once_computed, sequence.num_computed)
