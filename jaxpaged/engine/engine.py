"""Runs requests until they end, and lends the pool: the door to the engine's room, for one caller at a time."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import weakref
from collections.abc import Generator, Iterator

import jax

from jaxpaged.device import steps
from jaxpaged.device.attention import AttentionKernels
from jaxpaged.device.param_nodes import Params
from jaxpaged.device.programs import ProgramToMake
from jaxpaged.engine.loan import PoolLoan
from jaxpaged.engine.record import RunRecord
from jaxpaged.engine.runner import StepRunner
from jaxpaged.engine.step_loop import StepLoop
from jaxpaged.engine.warm_up import Progress, WarmUp, Watch, no_progress
from jaxpaged.host.account.accounting import RunStats
from jaxpaged.host.account.trace import TraceRecorder
from jaxpaged.host.arrivals import Arrivals, StreamedGroups
from jaxpaged.host.ownership import TREE, Hold, Ownership, pool_ownership
from jaxpaged.host.pages.page_allocator import PageAllocator
from jaxpaged.host.pages.shared_prefix import prefix_of
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.host.sequence import SequenceGroup
from jaxpaged.host.shared_queue import SharedArrivals, SharedQueue
from jaxpaged.host.step.batching import StepShape
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.host.step.foreseen import first_decode_shape, foreseen_shapes
from jaxpaged.host.systems.reservation import Paged
from jaxpaged.host.systems.roles import ChunkAllocator

logger = logging.getLogger("jaxpaged")

Groups = list[SequenceGroup] | StreamedGroups


class Engine:
    """Runs sequence groups to their end over one page pool.

    State: what the runner holds on the device, and the scheduler's queues and tables. There is no random state: a row's
    random numbers follow from its seed, sample index and position.

    Full pages stay known by their tokens from one run or tree to the next, unless it was interrupted (prefix_cache.py).

    All of it belongs to one caller at a time (`owner`, ownership.py): a run from its first result to its end, a tree
    until it is closed. Where a method takes a `hold`, it is for who has the pool already; others need none, and own the
    pool for the call. RuntimeError while another has it, before anything is changed.
    """

    #: Whether Python ends, and has taken the names from its modules: kept here for a run that is open until then.
    _is_ending = staticmethod(sys.is_finalizing)

    def __init__(self, runner: StepRunner, owner: Ownership | None = None):
        self.owner = owner or pool_ownership()
        self.runner = runner
        self.model = runner.model
        self.cache_config = runner.cache_config
        self.limits = runner.limits
        self.device = runner.device
        self.scheduler = Scheduler(self.cache_config, self.limits)
        # The allocator that the last run or tree has left, if it left it in order; and the weights of what that knows.
        self._left: PageAllocator | ChunkAllocator | None = None
        self._params_of_pages = weakref.ref(runner.params)
        self.record = RunRecord(self.cache_config)
        self.recorder: TraceRecorder | None = None  # takes down the next run, if someone sets it

    @property
    def params(self) -> Params:
        return self.runner.params

    @property
    def dtype(self) -> str:
        """Of weights and activations; keys and values have the dtype of `cache_config`."""
        return jax.tree.leaves(self.params)[0].dtype.name

    @property
    def kernels(self) -> AttentionKernels:
        return self.runner.kernels

    @property
    def stats(self) -> RunStats:
        """Of the latest run."""
        return self.record.stats

    def run(self, groups: Groups, hold: Hold | None = None) -> Generator[SequenceGroup, None, None]:
        """Run the groups together; yields each when all its samples have ended. Leaving early drops the others.

        A group is queued when its `arrival_time` has come; while nothing is there to run, the engine sleeps. Where the
        groups have a `prefix_len`, their first so many tokens are the same, and are computed and kept once.
        Streamed groups are read while others run, at most twice `max_num_seqs` ahead of the results.
        """
        with contextlib.closing(self.run_steps(groups, hold)) as steps_taken:
            for finished in steps_taken:
                yield from finished

    def run_steps(
        self, groups: Groups, hold: Hold | None = None, share: tuple[SharedQueue, int] | None = None
    ) -> Generator[list[SequenceGroup], None, None]:
        """As `run`, but yields after every step: the groups that it finished, often none.

        `share`: the queue in which the groups are, of which this engine, the so manieth, takes some (replicas.py).
        """
        with self._from_idle("Engine.run", hold):
            for group in _known(groups):  # before any of them runs
                self.scheduler.check(group.prompt_len, group.params.num_samples, group.max_len, group.prefix_len)
            try:
                yield from self._run_steps(groups, share)
            finally:
                self.recorder = None

    def _run_steps(self, groups: Groups, share: tuple[SharedQueue, int] | None) -> Iterator[list[SequenceGroup]]:
        prefix = prefix_of(_known(groups))
        self.scheduler.expect(_known(groups))
        arrivals, listed = self._coming(groups, share)
        features = SamplingFeatures.of(_known(groups), self.model.vocab_size)
        loop = self._begin_loop(features, self.recorder)
        # Not while a trace is recorded, which is of sequences, nor for who steps by hand and looks at them; nor where
        # pages are given back, which arrays of beams do not.
        policy = self.scheduler.policy
        is_plain = self.recorder is None and isinstance(policy, Paged) and policy.window is None
        self.scheduler.gathers_beams = is_plain and features.merged_widths is not None
        loop.record.add_requests(listed if share is None else [])
        made_before, read_before = steps.num_programs(), steps.num_read()
        self.runner.compile_ahead(self._foreseen(listed), features, behind_first=self.device.platform != "cpu")
        if prefix:
            self.scheduler.share_prefix(prefix)
        try:
            while arrivals or loop.has_work:
                for group in self._arrived(arrivals, loop):
                    self.scheduler.add(group)
                if not loop.has_work:
                    if isinstance(arrivals, StreamedGroups):
                        continue  # it is at its end
                    loop.record.stats.add_pause()
                    time.sleep(arrivals.seconds_to_next(loop.record.seconds))
                    yield []
                    continue
                finished = loop.step()
                loop.record.made(steps.num_programs() - made_before, steps.num_read() - read_before)
                yield finished
        finally:
            self.runner.stop_ahead()
        stats = loop.record.stats
        if stats.programs_made:
            logger.info("programs: %d compiled and %d read in this run", stats.compilations, stats.programs_read)

    def _coming(
        self, groups: Groups, share: tuple[SharedQueue, int] | None
    ) -> tuple[Arrivals | SharedArrivals | StreamedGroups, list[SequenceGroup]]:
        """Where requests come from, and those that will, as far as that is known."""
        if isinstance(groups, StreamedGroups):
            return groups, []
        if share is None:
            return Arrivals(groups), groups
        shared = SharedArrivals(*share, self.scheduler)
        return shared, shared.known

    def _arrived(self, arrivals: Arrivals | SharedArrivals | StreamedGroups, loop: StepLoop) -> list[SequenceGroup]:
        """What is to be queued before the next step."""
        now = loop.record.seconds
        if isinstance(arrivals, Arrivals):
            return arrivals.take(now)
        if isinstance(arrivals, SharedArrivals):
            shared = arrivals.take(now)
            loop.record.add_requests(shared)
            return shared
        num_inside = len(self.scheduler.waiting) + len(self.scheduler.running)
        taken = arrivals.take(2 * self.limits.max_num_seqs - num_inside, is_idle=not loop.has_work)
        loop.record.add_requests(taken)
        for group in taken:
            group.arrival_time = now
        return taken

    def _foreseen(self, groups: list[SequenceGroup]) -> list[StepShape]:
        """Steps whose programs are to be compiled while the run goes on. Where the CPU computes the steps, too, only
        the one that is sure to be needed next."""
        limits = self.runner.buckets, self.limits, self.cache_config
        if self.device.platform != "cpu":
            return foreseen_shapes(groups, *limits)
        first = first_decode_shape(groups, *limits)
        return [] if first is None else [first]

    @contextlib.contextmanager
    def step_by_hand(self, features: SamplingFeatures, scheduler: Scheduler | None = None) -> Iterator[StepLoop]:
        """The pool for the block, and the loop over its steps, for who queues requests (`loop.scheduler.add`) and steps
        by hand; the requests ask for these features. `scheduler`: one that has planned steps already."""
        with self._from_idle("Engine.step_by_hand"):
            if scheduler is None:
                yield self._begin_loop(features)
                return
            self.scheduler = scheduler
            try:
                yield self._begin_loop(features)
            finally:  # which pages are known is told by another allocator than the one that has been used
                self.scheduler = Scheduler(self.cache_config, self.limits)

    def _begin_loop(self, features: SamplingFeatures, trace: TraceRecorder | None = None) -> StepLoop:
        """While a trace is recorded nothing overlaps: it shows what is known when a step is planned."""
        if trace is not None:
            trace.begin(self.scheduler)
        self.record = RunRecord(self.cache_config, self.runner.page_bytes, trace)
        is_async = self.limits.async_scheduling and trace is None
        return StepLoop(self.runner, self.scheduler, features, self.record, is_async)

    def warm_up(self, groups: list[SequenceGroup], progress: Progress = no_progress) -> WarmUp:
        """Compile every program that requests like these can need, whatever their number and lengths."""
        with self._from_idle("warm_up"):
            watch = Watch()
            self.runner.compile_steps(SamplingFeatures.of(groups, self.model.vocab_size), progress)
            return watch.result()

    def programs(self, shape: StepShape, features: SamplingFeatures) -> list[ProgramToMake]:
        """The programs of a step of this shape: the engine finds them once they are compiled, which threads may do."""
        with self.owner.held("Engine.programs"):
            return self.runner.programs(shape, features)

    @contextlib.contextmanager
    def lend_pool(self) -> Iterator[PoolLoan]:
        """Leave the pool and its pages for the block to a caller who plans the steps (tree/on_engine.py)."""
        with self._from_idle(TREE) as hold:
            allocator = self.scheduler.allocator
            if not isinstance(allocator, PageAllocator):
                raise ValueError(
                    f"a tree shares pages, and kv_cache={self.limits.kv_cache!r} cannot: use kv_cache='paged'"
                )
            yield PoolLoan(self.runner, allocator, self.owner, hold)

    @contextlib.contextmanager
    def _from_idle(self, who: str, hold: Hold | None = None) -> Iterator[Hold]:
        """The pool for the block alone, with all its pages free, whatever an interrupt left, before and behind it.

        What it leaves behind asks nothing of jax, since a run may be dropped at any moment, the process' end included.
        """
        with self.owner.held(who, hold) as hold:
            steps.begin_run()
            if self._params_of_pages() is not self.params:
                self._left = None
            if self.runner.has_lost_pool:
                self.runner.remake_pool()
                self._left = None
            self._reset()
            self._left = None  # whatever ends the block but its end: a step may be planned and not launched
            try:
                yield hold
                self._left = self._allocator_to_keep()
            except GeneratorExit:  # the run was left between two steps: all that was planned has been launched
                self._left = self._allocator_to_keep()
                raise
            finally:
                if not self._is_ending():
                    self._reset()

    def _allocator_to_keep(self) -> PageAllocator | ChunkAllocator | None:
        return self.scheduler.allocator if self.limits.prefix_caching else None

    def _reset(self) -> None:
        """Forget all requests. The allocator stays, and what it knows, if the last who had it left it in order."""
        allocator, self._left = self._left, None  # an interrupt in what follows costs what is known, no more
        is_same_pool = allocator is not None and allocator.num_pages == self.cache_config.num_pages
        kept = allocator if is_same_pool and isinstance(allocator, PageAllocator) else None
        if kept is not None:
            kept.drop_tables()
        self.scheduler = Scheduler(self.cache_config, self.limits, kept)
        self.runner.forget_swapped()
        self._params_of_pages = weakref.ref(self.params)
        self._left = kept

    def forget_pages(self) -> None:
        """Whatever comes next is computed."""
        with self.owner.held("reset_prefix_cache"):
            self._left = None
            self._reset()


def _known(groups: Groups) -> list[SequenceGroup]:
    """What says before a run what its groups will ask for."""
    return groups.examples if isinstance(groups, StreamedGroups) else groups
