"""Decides what each step computes: admits waiting requests, grows block tables, preempts when pages run out.

    plan = scheduler.schedule()                    # decide
    outputs = ...                                  # the device computes
    finished = scheduler.commit(plan, outputs)     # learn

While the device computes, the next step can be decided already, from what is known of this one without its tokens:

    scheduler.foresee(plan)
    following = scheduler.schedule(is_ahead=True)  # None where it must wait for the tokens
    finished = scheduler.commit(plan, outputs)

First come, first served: groups are admitted in order of arrival, the latest arrival is preempted first, and a
preempted group goes back to the head of the queue. So the running groups are always those that arrived first. A
preempted group gives up all its pages. Either they are kept in host memory (swap.py), and it goes on where it was once
they fit the pool again; or it is prefilled again, its sharing rebuilt (token_tree.py).

A prefix that all requests share is prefilled before the first is admitted, and never gives way (shared_prefix.py).
Full pages of earlier sequences, ended ones too, are found by their tokens, and need not be computed (known_pages.py).

`schedule` reads the lengths of sequences, never the values of their last tokens. So a sample that is seen to have
ended, by a token or a text, may have a row in the step that is in flight: what that chooses is trimmed. Its pages are
free at once all the same, since the device carries out one step after the other: whoever gets them writes later.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import deque

from jaxpaged.config import CacheConfig, EngineConfig
from jaxpaged.host.beams.beam_groups import GroupRows, advance_groups
from jaxpaged.host.decoding import give_way, place_beams, place_tokens
from jaxpaged.host.failure import fail
from jaxpaged.host.mixing import Mixing
from jaxpaged.host.pages.beam_tables import BeamTables
from jaxpaged.host.pages.block_table import BlockTable, PageCopy, num_pages_for, num_pages_needed
from jaxpaged.host.pages.known_pages import KnownPages
from jaxpaged.host.pages.page_allocator import OutOfPagesError, PageAllocator
from jaxpaged.host.pages.shared_prefix import make_prefix
from jaxpaged.host.pages.swap import Swap, SwapSpace
from jaxpaged.host.pages.token_tree import SequencePlacement, plan_placements
from jaxpaged.host.prefill_queue import PrefillQueue
from jaxpaged.host.sequence import Sequence, SequenceGroup, SequenceStatus
from jaxpaged.host.step.step_plan import PlanRow, Sample, SearchRows, StepPlan
from jaxpaged.host.stopping import apply_stop
from jaxpaged.host.systems.no_cache import NoCache
from jaxpaged.host.systems.policies import make_policy
from jaxpaged.host.systems.reservation import Paged, prompt_in_words
from jaxpaged.step_io import NULL_PAGE, StepOutputs


class Scheduler:
    """Queues, block tables and policy. Knows no arrays of keys and no device."""

    def __init__(self, cache: CacheConfig, limits: EngineConfig, allocator: PageAllocator | None = None):
        """`allocator`: of a paged pool, all of whose pages are free; by default that of a new one."""
        self.cache = cache
        self.limits = limits
        self.policy = make_policy(cache, limits, allocator)
        self.allocator = self.policy.allocator
        self.waiting: deque[SequenceGroup] = deque()
        self.running: list[SequenceGroup] = []  # in order of arrival
        self.prefix: SequenceGroup | None = None  # what all of them share
        self.longest_output = 0  # tokens that a request of the run may generate: a static batch can last as long
        self._known = KnownPages(self.policy.allocator if isinstance(self.policy, Paged) else None, self.policy.window)
        self.num_cached_tokens = 0  # of prompts, found in known pages when these were first admitted
        self._prefill = PrefillQueue(limits, self.policy, self._known)
        self._mixing = Mixing(limits, cache)
        self._batch: list[Sample] | None = None  # of all who run; None when it must be listed anew
        self._decoded: list[Sample] | None = None  # the batch of the latest decode step
        self.gathers_beams = False  # whether beams run as arrays where they can (gathering.py)
        self.swap_space = SwapSpace(limits.preemption)
        self._swaps: list[Swap] = []  # of the step that is being planned
        self._copies: list[PageCopy] = []  # likewise
        self.is_short = False  # whether the head of the queue found no memory when the latest step was planned
        self._watermark = math.ceil(limits.watermark * cache.num_usable_pages)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self._prefill.has_work)

    @property
    def tables(self) -> list[BlockTable]:
        """Of every running sequence; searches whose beams are arrays have others."""
        return [sample.sequence.table for sample in self._samples()]

    @property
    def beam_tables(self) -> list[BeamTables]:
        """Of every running search whose beams are arrays."""
        return [group.tables for group in self.running if group.tables is not None]

    @property
    def prefix_tables(self) -> list[BlockTable]:
        """Of the prefix that the run shares, if there is one: held besides those of running sequences."""
        return [] if self.prefix is None else [self.prefix.sequences[0].table]

    @property
    def num_cached_pages(self) -> int:
        """Pages that nobody holds, but that can be found by their tokens."""
        return self.allocator.num_resting if isinstance(self.allocator, PageAllocator) else 0

    def share_prefix(self, token_ids: list[int]) -> None:
        """Compute these tokens first, and keep them in the pool for all groups, whose `prefix_len` is their number."""
        assert isinstance(self.policy, Paged), "only pages are shared by count"
        assert not self.has_work and self.prefix is None, "a run has one shared prefix, and begins with it"
        self.prefix = make_prefix(token_ids)
        (sequence,) = self.prefix.sequences
        found = self._known.find(self.prefix, sequence)
        sequence.table = self.policy.place_prefix(len(token_ids), found)
        self.swap_space.pinned_pages = sequence.table.pages[: len(token_ids) // self.cache.page_size]
        self.num_cached_tokens += (num_found := len(found) * self.cache.page_size)
        self._prefill.add(self.prefix, [SequencePlacement(sequence, num_found, len(token_ids) - num_found)])

    def check(self, prompt_len: int, num_samples: int, max_len: int, prefix_len: int = 0) -> None:
        """Raise ValueError for a request that could not run even alone, with the numbers that say why.

        `prefix_len`: tokens of the prompt that the run shares; 0 where the policy shares no pages.
        """
        if prompt_len >= self.limits.max_model_len:
            raise ValueError(
                f"{prompt_in_words(prompt_len, prefix_len)} leaves no room to generate: "
                f"max_model_len is {self.limits.max_model_len}"
            )
        if num_samples > self.limits.max_num_seqs:
            raise ValueError(f"{num_samples} samples of one request exceed max_num_seqs={self.limits.max_num_seqs}")
        self.policy.check(prompt_len, num_samples, max_len, prefix_len)

    def expect(self, groups: list[SequenceGroup]) -> None:
        """Groups like these will be added in this run."""
        self.longest_output = max((group.max_len - group.prompt_len for group in groups), default=0)

    def add(self, group: SequenceGroup) -> None:
        """Queue a request. It will finish, however small the pool: what can never fit is refused here (ValueError)."""
        self.check(group.prompt_len, group.params.num_samples, group.max_len, group.prefix_len)
        self.longest_output = max(self.longest_output, group.max_len - group.prompt_len)
        self.waiting.append(group)

    def schedule(self, is_ahead: bool = False) -> StepPlan | None:
        """The next step, or None when there is nothing to do. Prompts go first, together with those who decode or not:
        they fill the batch for decoding.

        `is_ahead`: a step is in flight. None also where a group has to give way: it gives up tokens that are known.
        """
        self.is_short = False
        self._copies += self.policy.take_copies()  # before anything is admitted: nothing has taken their sources yet
        while self._is_prefix_computed and self.waiting and self._try_admit(self.waiting[0]):
            self.waiting.popleft()
        if is_ahead and self.is_short and self.tables_ahead:
            return None  # there may be room when it is known which beams go on
        self._copies += self.policy.take_copies()  # of part-filled pages of the prefix, for those who were admitted
        if not self.has_work:
            self._copies.clear()
            return None
        if self._prefill.has_work:
            mixed = self._mixing.plan(self._decoding(), self.running, self._prefill, self.policy)
            plan = mixed or self._prefill.plan()
            self._batch = None  # samples may have forked
        elif isinstance(self.policy, NoCache):
            plan = self._plan_recompute()
        else:
            plan = self._plan_decode(may_preempt=not is_ahead)
        if plan is not None:
            plan.swaps, self._swaps = self._swaps, []
            plan.copies, self._copies = plan.copies + self._copies, []
        return plan

    # Admission

    @property
    def _is_prefix_computed(self) -> bool:
        return self.prefix is None or self.prefix.sequences[0].num_computed == self.prefix.prompt_len

    def _try_admit(self, group: SequenceGroup) -> bool:
        if self._prefill.num_tokens >= self.limits.max_num_batched_tokens:
            return False
        if sum(g.num_rows for g in self.running) + group.num_rows > self.limits.max_num_seqs:
            return False
        if not (self._try_swap_in(group) if self.swap_space.holds(group) else self._try_start_prefill(group)):
            self.is_short = True
            return False
        for sequence in group.unfinished:
            sequence.status = SequenceStatus.RUNNING
        group.record_pages()
        self.running.append(group)
        self._batch = None
        return True

    def _try_swap_in(self, group: SequenceGroup) -> bool:
        assert isinstance(self.allocator, PageAllocator), "only pages that are shared by count are swapped"
        if self.swap_space.num_pages_of(group) + self._headroom(group) > self.allocator.num_free:
            return False
        self._swaps.append(self.swap_space.bring_back(group, self.allocator))
        return True

    def _try_start_prefill(self, group: SequenceGroup) -> bool:
        placements = plan_placements(group, self.cache.page_size, functools.partial(self._find, group))
        if not self.policy.try_place(group, placements, lambda: self._headroom(group)):
            return False
        if placements[0].found and not group.num_preemptions:
            group.cached_tokens = placements[0].num_shared - group.prefix_len
            self.num_cached_tokens += group.cached_tokens
        self._prefill.add(group, placements)
        return True

    def _find(self, group: SequenceGroup, sequence: Sequence) -> list[int]:
        """Known pages with the first tokens of a sequence. Those of the run's prefix are the prefix's own."""
        found, own = self._known.find(group, sequence), group.prefix_len // self.cache.page_size
        gone = found.count(NULL_PAGE)
        if len(found) <= own:
            return []
        return [*found[:gone], *self.swap_space.pinned_pages[gone:own], *found[max(gone, own) :]]

    def _headroom(self, group: SequenceGroup) -> int:
        """Pages to leave free when `group` is admitted, so that it is not preempted at once; none when it is alone."""
        if not self.running:
            return 0
        tables = self.tables
        assert isinstance(self.allocator, PageAllocator), "nothing that was reserved needs headroom"
        next_step = num_pages_needed(tables, [1] * len(tables), self.allocator)
        next_step += sum(one.num_needed() for one in self.beam_tables)
        return self._watermark + next_step + group.num_rows

    def _samples(self) -> list[Sample]:
        """Every running sequence, with its row in a decode step. The same from step to step until one comes or goes."""
        if self._batch is None:
            self._batch, rows = [], itertools.count()
            for group in self.running:
                if group.tables is None:
                    self._batch += map(Sample, itertools.repeat(group), group.unfinished, rows)
        return self._batch

    def _decoding(self) -> list[Sample]:
        """Of these, those that have all their tokens computed but the last."""
        if not self._prefill.has_work:
            return self._samples()
        waiting, rows = self._prefill.sequences, itertools.count()
        return [Sample(group, one, next(rows)) for group, one, _ in self._samples() if one not in waiting]

    def _searching(self, first_row: int) -> list[SearchRows]:
        """The searches whose beams are arrays, behind the rows of samples."""
        searches: list[SearchRows] = []
        for group in self.running:
            if group.tables is not None:
                searches.append(SearchRows(group, first_row, group.tables.width, group.tables.num_slots))
                first_row += group.tables.width
        return searches

    # Decode and preemption

    def _plan_decode(self, may_preempt: bool) -> StepPlan | None:
        if self._samples() is not self._decoded and any(one.num_in_flight for one in self.beam_tables):
            return None  # rows that are listed anew begin with tables that are known
        plan = StepPlan(is_prefill=False)
        while True:
            samples = self._decoding()
            searches = self._searching(len(samples))
            try:
                plan.search_copies = place_beams(searches, samples, self.policy)
                plan.starts, plan.copies = place_tokens(samples, self.policy)
                break
            except OutOfPagesError:
                if not may_preempt:
                    return None
                assert len(self.running) > 1, "a group that was admitted does not fit the pool alone"
                self._preempt(self.running.pop(), plan)
        plan.samples, plan.searches = samples, searches
        self._decoded = self._batch
        plan.num_idle_rows = self.policy.num_idle_rows
        return plan

    def _plan_recompute(self) -> StepPlan:
        """The decode step of a system without a cache: all tokens of every running sequence, for one more each."""
        samples = self._decoding()
        rows = [PlanRow(group, sequence, 0, sequence.num_tokens) for group, sequence, _ in samples]
        return StepPlan(is_prefill=True, listed=rows, samples=samples)

    def _preempt(self, group: SequenceGroup, plan: StepPlan) -> None:
        self._swaps += give_way(group, plan, self.policy, self.swap_space, self._known, self.cache.page_size)
        self.waiting.appendleft(group)
        self._batch = None

    # Learning from a step

    def can_foresee(self, plan: StepPlan) -> bool:
        """Whether the next step can be planned without the tokens of this one: not where beams choose theirs here, nor
        where a step computes all tokens again."""
        if isinstance(self.policy, NoCache) or any(sample.group.beams for sample in plan.samples):
            return False
        return all(search.group.beams[0].goes_on_behind_next for search in plan.searches)

    def foresee(self, plan: StepPlan) -> None:
        """Take what is known of a step without its tokens: samples are longer by one, and end where that is all they
        may be long. Their memory is free from here on; their last token comes by `commit`."""
        ended = []
        for row, (group, sequence, _) in enumerate(plan.samples):
            if group.beams or sequence.status is SequenceStatus.FINISHED:
                continue
            sequence.num_pending, sequence.pending_row = 1, row
            if len(sequence.token_ids) + 1 >= group.max_len:
                self._end(group, sequence)
                ended.append(group)
        plan.leaving = self._leave(ended)

    def commit(self, plan: StepPlan, outputs: StepOutputs) -> list[SequenceGroup]:
        """Append the chosen tokens, end the samples that are done and free their pages; returns the finished groups.

        A group of which some sample has no token (step_io.py has the codes) ends as a whole.
        """
        ended, failed = self._take_tokens(plan, outputs)
        searches = {} if outputs.candidates is None else _first_rows(plan)
        if searches:
            done, is_changed = advance_groups(list(searches.values()), outputs, self.policy, self.gathers_beams)
            ended += done
            if is_changed:
                self._batch = None
        for group in failed:
            if group.unfinished:  # else it has ended already, or was foreseen to
                ended.append(group)
            fail(group, self.policy)
            self._prefill.drop(group)  # samples that came back from a preemption
        left = plan.leaving + self._leave(ended)
        for group in searches:
            if group not in ended:
                self.policy.settle(group)
        return left

    @property
    def tables_ahead(self) -> list[BeamTables]:
        """Of searches in the step in flight: when it was planned, it was not known which beams go on in it."""
        return [one for one in self.beam_tables if one.num_in_flight]

    def _take_tokens(self, plan: StepPlan, outputs: StepOutputs) -> tuple[list[SequenceGroup], list[SequenceGroup]]:
        """The samples' new tokens; returns the groups of which some sample has ended by its token or text, or by a
        length that nobody had foreseen, and those of which some has no token."""
        tokens, logprobs = outputs.tokens.tolist(), outputs.token_logprobs.logprobs.tolist()
        ended: list[SequenceGroup] = []
        failed: dict[SequenceGroup, None] = {}
        for i, (group, sequence, _) in enumerate(plan.samples):
            if group.beams:
                assert outputs.candidates is not None, "beams ran, but no candidates came"
                continue
            if sequence.finish_reason is not None:  # it had ended, as the step before has told
                plan.num_trimmed += 1
                continue
            sequence.num_pending = 0
            token_id = tokens[i]
            if token_id < 0 or group.failure:
                group.failure, failed[group] = group.failure or token_id, None
            if token_id < 0:
                continue
            sequence.token_ids.append(token_id)
            sequence.cumulative_logprob += logprobs[i]
            if apply_stop(group, sequence) and sequence.status is not SequenceStatus.FINISHED:
                self._end(group, sequence)
                ended.append(group)
        return ended, list(failed)

    def _end(self, group: SequenceGroup, sequence: Sequence) -> None:
        """A sample has all its tokens, or will have them with the step in flight; its memory is given back."""
        group.record_pages()
        self._known.add_generated(group, sequence)
        sequence.status = SequenceStatus.FINISHED
        # A row in flight has taken a slot behind that of the last token, which hindsight is not to count.
        sequence.table.num_slots = min(sequence.table.num_slots, sequence.num_tokens - 1)
        self.policy.release(sequence.table)

    def _leave(self, ended: list[SequenceGroup]) -> list[SequenceGroup]:
        """Some sequence of each of these groups has ended; returns the groups that leave now, of them and of others."""
        groups = list(dict.fromkeys(ended))
        for group in groups:
            self.policy.settle(group)
            self._batch = None
        over = [group for group in groups if not group.unfinished]
        left = self.policy.leave(over, self.longest_output)
        if left:
            self.running = [group for group in self.running if group.unfinished]
        return left

    def check_invariants(self) -> None:
        """Tables, memory and swap space agree. For tests, between steps."""
        swapped = [group for group in self.waiting if self.swap_space.holds(group)]
        assert sum(map(self.swap_space.num_pages_of, swapped)) + self.swap_space.num_free == self.swap_space.num_pages
        held = self.prefix_tables
        for group in (*self.running, *self.waiting):
            for sequence in group.sequences:
                assert len(sequence.table.pages) == num_pages_for(sequence.table.num_slots, self.cache.page_size)
                if sequence.status is SequenceStatus.SWAPPED:
                    assert self.swap_space.holds(group), "a swapped sequence has nothing in swap space"
                    continue
                assert sequence.status is SequenceStatus.RUNNING or not sequence.table.pages
                held.append(sequence.table)
            if group.tables is not None:
                held.append(group.tables.as_table())
        self.policy.check_invariants(held)


def _first_rows(plan: StepPlan) -> dict[SequenceGroup, GroupRows]:
    """Where each request's beams are in the step, in the order of rows. Of those whose beams are arrays some may have
    ended one step before, as it turned out."""
    rows: dict[SequenceGroup, GroupRows] = {}
    place = 0
    for row, (group, _, _) in enumerate(plan.samples):
        if group.beams and group not in rows:
            rows[group] = GroupRows(group, row, place)
            place += len(group.running_beams)
    for group, row, width, _ in plan.searches:
        if group.tables is None:
            plan.num_trimmed += width
        else:
            rows[group] = GroupRows(group, row, place)
        place += 1
    return rows
