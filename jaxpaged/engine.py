"""Schedule, run, commit: the loop that joins the two sides, and the only module that imports both."""

from __future__ import annotations

import time
from collections.abc import Iterator

import jax
import numpy as np

from jaxpaged.config import CacheConfig, EngineConfig, ModelConfig
from jaxpaged.device import steps
from jaxpaged.device.attention import AttentionKernels
from jaxpaged.device.cache import PagedCache, make_paged_cache
from jaxpaged.device.params import Params
from jaxpaged.host.accounting import RunStats
from jaxpaged.host.batching import Buckets, StepShape, make_batch, make_copies
from jaxpaged.host.features import SamplingFeatures
from jaxpaged.host.logprobs import collect_logprobs
from jaxpaged.host.scheduler import Scheduler, StepPlan
from jaxpaged.host.sequence import SequenceGroup
from jaxpaged.step_io import NULL_PAGE, Layout, StepOutputs, pack, unpack_logprobs


class Engine:
    """Runs sequence groups to their end over one page pool.

    State: the parameters, the pool (replaced by every step) and the scheduler's queues and tables. There is no random
    state: a row's random numbers follow from its seed, sample index and position.
    """

    def __init__(
        self,
        params: Params,
        model: ModelConfig,
        cache: CacheConfig,
        limits: EngineConfig,
        kernels: AttentionKernels,
        device: jax.Device,
    ):
        self.model = model
        self.cache_config = cache
        self.limits = limits
        self.kernels = kernels
        self.device = device
        self.params = params
        self.pool: PagedCache = make_paged_cache(model, cache, device)
        self.buckets = Buckets.for_limits(limits, cache)
        self.scheduler = Scheduler(cache, limits)
        self.features = SamplingFeatures()
        self.stats = RunStats.for_cache(cache)
        self._began = time.perf_counter()

    def run(self, groups: list[SequenceGroup]) -> Iterator[SequenceGroup]:
        """Run the groups together; yields each when all its samples have ended. Leaving early drops the others."""
        if self.scheduler.has_work:
            raise RuntimeError("another run is in progress: take all its results, or close its iterator, first")
        self.features = SamplingFeatures.of(groups, self.model.vocab_size)
        self.stats = stats = RunStats.for_cache(self.cache_config)
        stats.num_requests = len(groups)
        stats.num_prompt_tokens = sum(group.prompt_len for group in groups)
        compiled_before, self._began = steps.num_compiled(), time.perf_counter()
        try:
            for group in groups:
                self.scheduler.add(group)
            while self.scheduler.has_work:
                finished = self.step()
                stats.compilations = steps.num_compiled() - compiled_before
                stats.recomputed_tokens += sum(group.recomputed_tokens for group in finished)
                yield from finished
        finally:
            self.scheduler = Scheduler(self.cache_config, self.limits)
            if any(pool.is_deleted() for pool in self.pool.k):  # an interrupted step had taken it by donation
                self.pool = make_paged_cache(self.model, self.cache_config, self.device)

    def step(self) -> list[SequenceGroup]:
        """One step of the device for whatever the scheduler decides; returns the groups that it finished."""
        began = time.perf_counter()
        plan = self.scheduler.schedule()
        assert plan is not None, "step() without work"
        planned = time.perf_counter()
        self.stats.record(plan, self.scheduler)
        shape = self.buckets.shape_of(plan)
        packed, layout = pack(make_batch(plan, shape, self.cache_config, self.model.vocab_size, self.features))
        launched = time.perf_counter()
        if plan.copies:
            self.pool = steps.copy_pages(self.pool, self._upload(make_copies(plan, self.buckets)))
        outputs = self._launch(shape, packed, layout)
        arrived = time.perf_counter()
        collect_logprobs(plan, outputs)
        finished = self.scheduler.commit(plan, outputs)
        self._note_times(plan, finished, planned - self._began, arrived - self._began)
        self.stats.add_seconds(planned - began, arrived - launched, time.perf_counter() - began)
        return finished

    def warm_up(self, groups: list[SequenceGroup]) -> None:
        """Compile every program that requests like these can need, whatever their number and lengths."""
        self.features = SamplingFeatures.of(groups, self.model.vocab_size)
        for shape in self.buckets.shapes():
            nothing = StepPlan(is_prefill=shape.num_tokens is not None)
            batch = make_batch(nothing, shape, self.cache_config, self.model.vocab_size, self.features)
            self._launch(shape, *pack(batch))
        for size in self.buckets.copies:
            self.pool = steps.copy_pages(self.pool, self._upload(np.full((2, size), NULL_PAGE, np.int32)))

    def _launch(self, shape: StepShape, packed: np.ndarray, layout: Layout) -> StepOutputs:
        """Run one step and wait for what the host must learn of it."""
        features = self.features
        static = {
            "config": self.model, "kernels": self.kernels, "layout": layout,
            "num_logprobs": features.num_logprobs, "processors": features.processors,
        }  # fmt: skip
        prompt_columns = None
        if shape.num_tokens is None:
            columns, self.pool = steps.decode_step(self.params, self.pool, self._upload(packed), **static)
        else:
            columns, prompt_columns, self.pool = steps.prefill_step(
                self.params, self.pool, self._upload(packed), num_prompt_logprobs=features.num_prompt_logprobs, **static
            )
        array = np.asarray(columns)
        outputs = StepOutputs(array[:, 0], unpack_logprobs(array[:, 1:], features.num_logprobs))
        if prompt_columns is None:
            return outputs
        prompt = unpack_logprobs(np.asarray(prompt_columns), features.num_prompt_logprobs)
        return outputs._replace(prompt_logprobs=prompt)

    def _upload(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, self.device)

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
