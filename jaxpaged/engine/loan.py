"""The page pool on loan: what `Engine.lend_pool` gives to a tree, which takes pages and plans steps by itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from jaxpaged.config import CacheConfig, EngineConfig, ModelConfig
from jaxpaged.engine.runner import StepRunner
from jaxpaged.host.ownership import TREE, Hold, Ownership
from jaxpaged.host.pages.block_table import PageCopy
from jaxpaged.host.pages.page_allocator import PageAllocator
from jaxpaged.host.step.batching import Buckets
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.step_io import StepBatch, StepOutputs


class PoolLoan:
    """All pages of a pool, free, and steps over them; RuntimeError once it was given back.

    Attributes:
        allocator: the pages.
        model, cache_config, limits, buckets: what a step may be like.
    """

    def __init__(self, runner: StepRunner, allocator: PageAllocator, owner: Ownership, hold: Hold):
        self.allocator = allocator
        self.model: ModelConfig = runner.model
        self.cache_config: CacheConfig = runner.cache_config
        self.limits: EngineConfig = runner.limits
        self.buckets: Buckets = runner.buckets
        self._runner = runner
        self._owner = owner
        self._hold = hold

    @property
    def has_lost_pool(self) -> bool:
        return self._runner.has_lost_pool

    def run(self, batch: StepBatch, features: SamplingFeatures) -> StepOutputs:
        """Run one step; `features` are those that `batch` was made for."""
        with self._held():
            return self._runner.run(self._runner.prepare_batch(batch, features))

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        with self._held():
            self._runner.copy_pages(list(copies))

    def compile_step(self, batch: StepBatch, features: SamplingFeatures) -> None:
        with self._held():
            self._runner.compile_step(batch, features)

    def compile_copies(self) -> None:
        with self._held():
            self._runner.compile_copies()

    def _held(self) -> AbstractContextManager[Hold]:
        return self._owner.held(TREE, self._hold)
