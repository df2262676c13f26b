"""Schedule, run, commit: the loop that joins the two sides, and the only module that imports both."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Generator, Iterator
from typing import Any

import jax
import numpy as np

from jaxpaged.config import CacheConfig, EngineConfig, ModelConfig
from jaxpaged.device import steps, swap
from jaxpaged.device.attention import AttentionKernels
from jaxpaged.device.cache import PagedCache
from jaxpaged.device.dense_cache import make_cache
from jaxpaged.device.params import Params, param_shapes
from jaxpaged.host.account.accounting import RunStats
from jaxpaged.host.account.trace import TraceRecorder
from jaxpaged.host.arrivals import Arrivals
from jaxpaged.host.ownership import TREE, Hold, Ownership, pool_ownership
from jaxpaged.host.pages.block_table import PageCopy
from jaxpaged.host.pages.page_allocator import PageAllocator
from jaxpaged.host.pages.shared_prefix import prefix_of
from jaxpaged.host.pages.swap import Swap
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.host.sequence import SequenceGroup
from jaxpaged.host.step.batching import Buckets, StepShape, make_batch, make_copies, split, with_copies
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.host.step.id_check import check_copies, check_ids, check_pages
from jaxpaged.host.step.logprobs import collect_logprobs
from jaxpaged.host.step.prefix_groups import PrefixSharing, measured_rule, share_nothing, share_prefixes
from jaxpaged.host.step.step_plan import StepPlan
from jaxpaged.step_io import (
    NULL_PAGE,
    DecodeBatch,
    Layout,
    PrefillBatch,
    StepBatch,
    StepOutputs,
    num_merged_groups,
    pack,
    unpack_logprobs,
    unpack_outputs,
)


class Engine:
    """Runs sequence groups to their end over one page pool.

    State: the parameters, the pool (replaced by every step), the pages that are swapped out, and the scheduler's queues
    and tables. There is no random state: a row's random numbers follow from its seed, sample index and position.

    All of it belongs to one caller at a time (`owner`, ownership.py): a run from its first result to its end, a tree
    until it is closed. Where a method takes a `hold`, it is for who has the pool already; others need none, and own the
    pool for the call. RuntimeError while another has it, before anything is changed.
    """

    #: Whether Python ends, and has taken the names from its modules: kept here for a run that is open until then.
    _is_ending = staticmethod(sys.is_finalizing)

    def __init__(
        self,
        params: Params,
        model: ModelConfig,
        cache: CacheConfig,
        limits: EngineConfig,
        kernels: AttentionKernels,
        device: jax.Device,
        owner: Ownership | None = None,
    ):
        self.owner = owner or pool_ownership()
        self.model = model
        self.cache_config = cache
        self.limits = limits
        self.kernels = kernels
        self.device = device
        self.params = params
        self.pool: PagedCache = make_cache(model, cache, limits, device)
        self.buckets = Buckets.for_limits(limits, cache)
        self.sharing: PrefixSharing | None = None
        if limits.shares_prefixes:
            assert kernels.max_members is not None, f"{kernels.name} reads no shared prefixes"
            most = kernels.max_members(model.num_heads, model.num_kv_heads, model.head_dim)
            token_bytes = self.pool.k[0].nbytes * 2 // (cache.num_pages * cache.page_size)
            self.sharing = PrefixSharing(most, measured_rule(token_bytes))
        self.scheduler = Scheduler(cache, limits)
        self._page_bytes = cache.page_size * model.kv_bytes_per_token(jax.numpy.dtype(cache.dtype).itemsize)
        self._swapped: dict[SequenceGroup, list[jax.Array]] = {}
        self.features = SamplingFeatures()
        self.stats = RunStats.for_cache(cache)
        self.recorder: TraceRecorder | None = None  # takes down the run, if someone sets it
        self._began = time.perf_counter()

    def run(self, groups: list[SequenceGroup], hold: Hold | None = None) -> Generator[SequenceGroup, None, None]:
        """Run the groups together; yields each when all its samples have ended. Leaving early drops the others.

        A group is queued when its `arrival_time` has come; while nothing is there to run, the engine sleeps. Where the
        groups have a `prefix_len`, their first so many tokens are the same, and are computed and kept once.
        """
        with contextlib.closing(self.run_steps(groups, hold)) as steps_taken:
            for finished in steps_taken:
                yield from finished

    def run_steps(
        self, groups: list[SequenceGroup], hold: Hold | None = None
    ) -> Generator[list[SequenceGroup], None, None]:
        """As `run`, but yields after every step: the groups that it finished, often none."""
        with self._from_idle("Engine.run", hold) as hold:
            yield from self._run_steps(groups, hold)

    def _run_steps(self, groups: list[SequenceGroup], hold: Hold) -> Iterator[list[SequenceGroup]]:
        for group in groups:  # before any of them runs
            self.scheduler.check(group.prompt_len, group.params.num_samples, group.max_len, group.prefix_len)
        prefix = prefix_of(groups)
        arrivals = Arrivals(groups)
        self.features = SamplingFeatures.of(groups, self.model.vocab_size)
        self.stats = stats = RunStats.for_cache(self.cache_config)
        stats.num_requests = len(groups)
        stats.num_prompt_tokens = sum(group.prompt_len for group in groups)
        compiled_before, self._began = steps.num_compiled(), time.perf_counter()
        try:
            if prefix:
                self.scheduler.share_prefix(prefix)
            while arrivals or self.scheduler.has_work:
                for group in arrivals.take(self._seconds_since_start):
                    self.scheduler.add(group)
                if not self.scheduler.has_work:
                    stats.add_pause()
                    time.sleep(arrivals.seconds_to_next(self._seconds_since_start))
                    continue
                finished = self.step(hold)
                stats.compilations = steps.num_compiled() - compiled_before
                yield finished
        finally:
            self.recorder = None

    @contextlib.contextmanager
    def lend_pool(self) -> Iterator[tuple[PageAllocator, Hold]]:
        """Leave the pool and its pages for the block to a caller who plans the steps (tree_steps.py)."""
        with self._from_idle(TREE) as hold:
            allocator = self.scheduler.allocator
            if not isinstance(allocator, PageAllocator):
                raise ValueError(
                    f"a tree shares pages, and kv_cache={self.limits.kv_cache!r} cannot: use kv_cache='paged'"
                )
            yield allocator, hold

    @property
    def has_lost_pool(self) -> bool:
        """Whether a step that was interrupted had taken the pool by donation and never gave it back."""
        return any(pool.is_deleted() for pool in self.pool.k)

    def compute(self, batch: StepBatch, features: SamplingFeatures, hold: Hold | None = None) -> StepOutputs:
        """Run one step for the borrower of the pool; `features` are those that `batch` was made for."""
        with self.owner.held("Engine.compute", hold):
            self.features = features
            return self._launch(*pack(self._ready(batch)))

    def compile_step(self, batch: StepBatch, features: SamplingFeatures, hold: Hold | None = None) -> None:
        """Run an empty batch, with and without shared prefixes, so that the programs for such batches are there."""
        with self.owner.held("Engine.compile_step", hold):
            self.features = features
            self._launch(*pack(batch))
            if isinstance(batch, DecodeBatch) and (sharing := self._sharing_in_use) is not None:
                shared = share_nothing(batch, sharing)
                if shared is not None:
                    self._launch(*pack(shared))

    def lower_steps(self, shape: StepShape, features: SamplingFeatures) -> list[jax.stages.Lowered]:
        """The programs of a step of this shape, lowered for the engine's own arrays: it finds them once they are
        compiled, which several threads may do."""
        nothing = StepPlan(is_prefill=shape.num_tokens is not None)
        with self.owner.held("Engine.lower_steps"):
            self.features = features
            batch = make_batch(nothing, shape, self.cache_config, self.model.vocab_size, features)
            packed, layout = pack(self._with_copies(self._ready(batch), [])[0])
            static = static_arguments(self.model, self.kernels, layout, features)
            if nothing.is_prefill:
                return [steps.prefill_step.lower(self.params, self.pool, packed, **static)]
            return steps.lower_decode_step(self.params, self.pool, packed, self.device, **static)

    def compile_copies(self, hold: Hold | None = None) -> None:
        with self.owner.held("Engine.compile_copies", hold):
            for size in self.buckets.copies:
                self.copy_pages(np.full((2, size), NULL_PAGE, np.int32))

    def copy_pages(self, copies: np.ndarray) -> None:
        """copies i32[2, C] as `make_copies` pads them: source and destination pages. For who owns the pool."""
        check_copies(copies, self.cache_config)
        self.pool = steps.copy_pages(self.pool, copies, kernels=self.kernels)

    @contextlib.contextmanager
    def _from_idle(self, who: str, hold: Hold | None = None) -> Iterator[Hold]:
        """The pool for the block alone, with all its pages free, whatever an interrupt left, before and behind it.

        What it leaves behind asks nothing of jax, since a run may be dropped at any moment, the process' end included.
        """
        with self.owner.held(who, hold) as hold:
            self._reset()
            steps.begin_run()
            if self.has_lost_pool:
                self.pool = make_cache(self.model, self.cache_config, self.limits, self.device)
            try:
                yield hold
            finally:
                if not self._is_ending():
                    self._reset()

    def reset(self) -> None:
        """Drop what was queued by hand, for `step`; all pages are free again."""
        with self._from_idle("Engine.reset"):
            pass

    def _reset(self) -> None:
        self.scheduler = Scheduler(self.cache_config, self.limits)
        self._swapped.clear()

    @property
    def _seconds_since_start(self) -> float:
        return time.perf_counter() - self._began

    def step(self, hold: Hold | None = None) -> list[SequenceGroup]:
        """One step of the device for whatever the scheduler decides; returns the groups that it finished."""
        with self.owner.held("Engine.step", hold):
            return self._step()

    def _step(self) -> list[SequenceGroup]:
        began = time.perf_counter()
        plan = self.scheduler.schedule()
        assert plan is not None, "step() without work"
        planned = time.perf_counter()
        if self.recorder is not None:
            self.recorder.planned(plan, self.scheduler)
        self.stats.record(plan, self.scheduler)
        shape = self.buckets.shape_of(plan, self.features)
        batch = make_batch(plan, shape, self.cache_config, self.model.vocab_size, self.features)
        batch, copies_before = self._with_copies(self._ready(batch), plan.copies)
        packed, layout = pack(batch)
        launched = time.perf_counter()
        for one in plan.swaps:
            self._swap(one)
        swapped = time.perf_counter()
        for copies in make_copies(copies_before, self.buckets):
            self.copy_pages(copies)
        outputs = self._launch(packed, layout)
        arrived = time.perf_counter()
        collect_logprobs(plan, outputs)
        finished = self.scheduler.commit(plan, outputs)
        if self.recorder is not None:
            self.recorder.committed(self.scheduler)
        self._note_times(plan, finished, planned - self._began, arrived - self._began)
        ended = time.perf_counter()
        self.stats.add_seconds(planned - began, arrived - launched, ended - began)
        self.stats.add_times(began - self._began, ended - self._began)
        self.stats.add_preemption_seconds(plan, swapped - launched, arrived - swapped)
        return finished

    def warm_up(self, groups: list[SequenceGroup]) -> None:
        """Compile every program that requests like these can need, whatever their number and lengths."""
        with self._from_idle("warm_up") as hold:
            self._warm_up(groups, hold)

    def _warm_up(self, groups: list[SequenceGroup], hold: Hold) -> None:
        self.features = SamplingFeatures.of(groups, self.model.vocab_size)
        for shape in self.buckets.shapes():
            nothing = StepPlan(is_prefill=shape.num_tokens is not None)
            batch = make_batch(nothing, shape, self.cache_config, self.model.vocab_size, self.features)
            self.compile_step(self._with_copies(batch, [])[0], self.features, hold)
        self.compile_copies(hold)
        for size in self.buckets.swaps:
            nothing = np.full(size, NULL_PAGE, np.int32)
            self.pool = swap.restore_pages(self.pool, nothing, self._fetch(nothing), self.device)

    def _swap(self, one: Swap) -> None:
        """Carry out one swap, and wait for it."""
        page_ids = np.array(one.page_ids, np.int32)
        check_pages(page_ids, self.cache_config)
        if one.is_out:
            self._swapped[one.group] = self._fetch(page_ids)
        else:
            self.pool = swap.restore_pages(self.pool, page_ids, self._swapped.pop(one.group), self.device)
        self.stats.add_swap(one, len(page_ids) * self._page_bytes)

    def _fetch(self, page_ids: np.ndarray) -> list[jax.Array]:
        sizes = split(len(page_ids), self.buckets.swaps)
        return swap.fetch_pages(self.pool, page_ids, sizes, swap.host_memory(self.device), self.device)

    def _ready(self, batch: StepBatch) -> StepBatch:
        """The batch, its ids checked, with the prefixes that it is to read once."""
        check_ids(batch.inputs, self.cache_config)
        if isinstance(batch, DecodeBatch) and (sharing := self._sharing_in_use) is not None:
            return share_prefixes(batch, self.cache_config.page_size, sharing)
        return batch

    def _with_copies(self, batch: StepBatch, copies: list[PageCopy]) -> tuple[StepBatch, list[PageCopy]]:
        """The batch with these copies in its step, which spares their launch, where it takes such a list; and those
        that are to be made before it.

        In a run whose requests have samples every decode step takes one, so that there is one program, not two.
        """
        takes_list = self.features.has_samples and self.kernels.copies_in_steps
        if not (takes_list and isinstance(batch, DecodeBatch)):
            return batch, copies
        if len(copies) > len(batch.inputs.tokens):  # forks between chunks copy whole sequences
            return with_copies(batch, []), copies
        batch = with_copies(batch, copies)
        check_copies(batch.inputs.copies, self.cache_config)
        return batch, []

    @property
    def _sharing_in_use(self) -> PrefixSharing | None:
        """How decode steps share prefixes: not at all where no samples or beams could, nor requests of one prefix."""
        return self.sharing if self.features.has_samples or self.features.has_prefix else None

    def _launch(self, packed: np.ndarray, layout: Layout) -> StepOutputs:
        """Run one step and wait for what the host must learn of it."""
        features = self.features
        static = static_arguments(self.model, self.kernels, layout, features)
        prompt_columns = None
        if layout[0] is PrefillBatch:
            columns, prompt_columns, self.pool = steps.prefill_step(self.params, self.pool, packed, **static)
        else:
            columns, self.pool = steps.decode_step(self.params, self.pool, packed, **static)
        outputs = unpack_outputs(np.asarray(columns), features.wanted, num_merged_groups(layout))
        if prompt_columns is None:
            return outputs
        prompt = unpack_logprobs(np.asarray(prompt_columns), features.num_prompt_logprobs)
        return outputs._replace(prompt_logprobs=prompt)

    def _note_times(self, plan: StepPlan, finished: list[SequenceGroup], planned: float, done: float) -> None:
        if plan.is_prefill:
            for row in plan.rows:
                if row.group.first_scheduled_time < 0:
                    row.group.first_scheduled_time = planned
            for sample in plan.samples:
                if sample.group.first_token_time < 0:
                    sample.group.first_token_time = done
        for group in finished:
            group.finished_time = done


def lower_largest_steps(
    model: ModelConfig, cache: CacheConfig, limits: EngineConfig, kernels: AttentionKernels, device: jax.Device
) -> Iterator[jax.stages.Lowered]:
    """The largest decode step and the largest prefill step, with all that ordinary requests ask of the sampler."""
    buckets = Buckets.for_limits(limits, cache)
    width = buckets.table_widths[-1]
    features = SamplingFeatures(
        has_samples=True, num_candidates=min(64, model.vocab_size), draws_beams=True,
        is_random=True, is_filtered=True, is_penalised=True, num_logprobs=min(20, model.vocab_size),
    )  # fmt: skip
    for shape in (
        StepShape(buckets.decode_rows[-1], width),
        StepShape(buckets.prefill_rows[-1], width, buckets.prefill_tokens[-1]),
    ):
        yield lower_step(shape, model, cache, kernels, features, jax.sharding.SingleDeviceSharding(device), limits)


def lower_step(
    shape: StepShape,
    model: ModelConfig,
    cache: CacheConfig,
    kernels: AttentionKernels,
    features: SamplingFeatures,
    sharding: jax.sharding.Sharding,
    limits: EngineConfig | None = None,
) -> jax.stages.Lowered:
    """The program of a step of this shape, before there are weights or a pool: to learn what it takes, or to keep it.

    `sharding` names the device that it is for, `limits` the system that keeps KV memory, by default pages.
    """
    nothing = StepPlan(is_prefill=shape.num_tokens is not None)
    batch = make_batch(nothing, shape, cache, model.vocab_size, features)
    if isinstance(batch, DecodeBatch) and features.has_samples and kernels.copies_in_steps:
        batch = with_copies(batch, [])
    packed, layout = pack(batch)
    pool = jax.eval_shape(lambda: make_cache(model, cache, limits or EngineConfig(model.max_position_embeddings)))
    params, pool, packed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        (param_shapes(model, cache.dtype), pool, packed),
    )
    static = static_arguments(model, kernels, layout, features)
    if shape.num_tokens is not None:
        return steps.prefill_step.lower(params, pool, packed, **static)
    return steps.decode_layers.lower(params, pool, None, packed, layers=(0, model.num_layers), **static)


def static_arguments(
    model: ModelConfig, kernels: AttentionKernels, layout: Layout, features: SamplingFeatures
) -> dict[str, Any]:
    """What the step whose inputs have this layout is compiled for."""
    return {
        "config": model, "kernels": kernels, "layout": layout, "wanted": features.wanted,
        "processors": features.processors,
    }  # fmt: skip
