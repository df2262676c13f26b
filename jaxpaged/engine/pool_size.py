"""How many pages the pool gets: what fits the device beside the weights and the largest step, both as measured.

What a step takes is known before there is a pool, because its temporaries do not depend on the pool's size: the largest
decode step and the largest prefill step are compiled for a pool of a nominal size, and the compiler says. The engine
compiles them again when it first needs them (the pool's shape is part of a program); what the compiler said is kept in
the files of compiled programs, so later processes do not even trace them. Where everything of use fits by a generous
estimate, as it does for small models, nothing is measured.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpaged.config import DENSE_CACHES, CacheConfig, EngineConfig, ModelConfig
from jaxpaged.device.attention import AttentionKernels
from jaxpaged.device.memory import bytes_in_use, device_memory
from jaxpaged.device.mesh import Placement
from jaxpaged.device.param_nodes import Params
from jaxpaged.device.params import param_shapes
from jaxpaged.device.program_files import recall, remember
from jaxpaged.device.programs import ProgramToMake
from jaxpaged.device.swap import transfer_bytes
from jaxpaged.engine.lowering import largest_steps
from jaxpaged.engine.warm_up import Ahead, compile_together

logger = logging.getLogger("jaxpaged")

GIB = 1 << 30
#: Without num_pages, a pool in main memory takes no more than this: other programs live there too.
CPU_POOL_BYTES = 1 * GIB
#: Pages of the pool for which steps are compiled to be measured.
NOMINAL_PAGES = 1024
#: So many numbers of pages there are between a power of two and the next one.
COARSE_PARTS = 64
#: Of the pages that fit, those that may be left unused for the sake of programs that are there.
UNUSED_SHARE = 2 / COARSE_PARTS
#: Share of the memory that stays free beside pool, weights and step: a step's inputs and results, the buffers in which
#: XLA tries out matrix products, holes between allocations. Programs and CUDA graphs take memory of the driver, which
#: lies in what `memory_utilization` leaves of the card.
RESERVE_SHARE = 0.005


class PoolSize(NamedTuple):
    """How large a pool is, and why."""

    num_pages: int  # NULL_PAGE included
    reason: str


@dataclass(frozen=True)
class PoolSizer:
    """Weighs a pool against the memory of a device."""

    model: ModelConfig  # the whole one
    dtype: str  # of weights and activations
    kv_dtype: str
    page_size: int
    limits: EngineConfig
    kernels: AttentionKernels
    where: jax.Device | Placement  # if several, each holds a shard of the weights and of every page
    memory: int  # bytes of each device that weights, pool and steps may fill

    @property
    def placement(self) -> Placement:
        return Placement.of(self.where)

    @property
    def device(self) -> jax.Device:
        return self.placement.device

    @property
    def shard(self) -> ModelConfig:
        return self.placement.shard(self.model)

    @property
    def page_bytes(self) -> int:
        """Of one device, as all bytes here are."""
        return self.page_size * self.shard.kv_bytes_per_token(jnp.dtype(self.kv_dtype).itemsize)

    @property
    def weight_bytes(self) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(param_shapes(self.shard, self.dtype)))

    def check(self, num_pages: int | None) -> None:
        """Refuse, before weights are read, `num_pages` (None: at least one page) that cannot fit beside them."""
        if num_pages is None:
            self._fitting_pages(self.weight_bytes, self._least_step_bytes())
        elif self.weight_bytes + num_pages * self.page_bytes > self.memory:
            most = max(0, self.memory - self.weight_bytes) // self.page_bytes
            raise ValueError(
                f"num_pages={num_pages} pages take {num_pages * self.page_bytes / GIB:.2f} GiB and the weights "
                f"{self.weight_bytes / GIB:.2f} GiB; they may fill {self.memory / GIB:.2f} GiB of "
                f"{self.device.device_kind}: at most about {most} pages fit"
            )
        else:
            CacheConfig(self.page_size, num_pages, self.kv_dtype)  # says what is wrong with a pool of one page

    def choose(self, params: Params | None = None) -> PoolSize:
        """As many pages as are of use and fit beside the weights: `params`, which are on the device, or what they would
        take."""
        weights = self.weight_bytes
        if params is not None:
            jax.block_until_ready(params)
            weights = max(bytes_in_use(device) or weights for device in self.placement.devices)
        useful = self._useful()
        if self._fits(useful.num_pages, weights):
            return useful
        step = self.measured_step_bytes()
        num_pages = self._steady_pages(self._fitting_pages(weights, step))
        if useful.num_pages <= num_pages:
            return useful
        return PoolSize(
            num_pages,
            f"what {weights / GIB:.2f} GiB of weights and {step / GIB:.2f} GiB for the largest step leave of the "
            f"{self.memory / GIB:.2f} GiB that they may fill on {self.device.device_kind}",
        )

    def in_words(self, pool: PoolSize) -> str:
        usable = CacheConfig(self.page_size, pool.num_pages).num_usable_tokens
        return (
            f"{pool.num_pages:,} pages of {self.page_size} tokens, so {usable:,} tokens "
            f"({pool.num_pages * self.page_bytes / GIB:.2f} GiB): {pool.reason}"
        )

    def compile_ahead(self) -> None:
        """Begin to compile the steps that `choose` will measure, if it will, while weights are loaded."""
        if not self._fits(self._useful().num_pages, self.weight_bytes) and recall(self._what) is None:
            Ahead(self._largest_steps())

    def _useful(self) -> PoolSize:
        """All that could be filled; in main memory no more than other programs can spare."""
        seqs, length = self.limits.max_num_seqs, self.limits.max_model_len
        useful = seqs * -(-length // self.page_size) + 1
        spare = CPU_POOL_BYTES // self.page_bytes
        if self.device.platform == "cpu" and spare < useful:
            return PoolSize(
                spare, f"{CPU_POOL_BYTES / GIB:g} GiB of main memory at most, unless num_pages says otherwise"
            )
        return PoolSize(useful, f"all that {seqs} sequences of {length:,} tokens can fill")

    def _fits(self, useful: int, weights: int) -> bool:
        """Whether so many pages fit, whatever a step takes."""
        return 2 <= useful <= self._room(weights, self._most_step_bytes())

    def _steady_pages(self, fitting: int) -> int:
        """A number that stays from start to start, while the pages that fit differ by a few: the pool's shape is part
        of every program, and with another one no file of an earlier process would be the right one.

        So numbers are coarse; and an earlier one is taken again where it fits and leaves little unused, since what fits
        may be near where the coarse number changes.
        """
        total, _ = device_memory(self.device)
        what = ("pages", self._identity, round(100 * self.memory / total))
        before = recall(what)
        if before is not None and fitting * (1 - UNUSED_SHARE) <= before <= fitting:
            return before
        remember(what, coarse(fitting))
        return coarse(fitting)

    @property
    def _identity(self) -> tuple[Hashable, ...]:
        """What the largest steps follow from, as text that another process finds again."""
        kernels = [value for value in self.kernels if not callable(value)]
        return (
            self.shard, self.dtype, self.kv_dtype, self.page_size, self.limits, tuple(kernels), self.device.device_kind,
        )  # fmt: skip

    def measured_step_bytes(self) -> int:
        """What the largest step allocates while it runs, as the compiler says; or has said to an earlier process."""
        known = recall(self._what)
        if known is None:
            remember(self._what, known := self._compiled_step_bytes())
        return known

    @property
    def _what(self) -> Hashable:
        """The name by which the number is remembered."""
        return "step bytes", self._identity

    def _compiled_step_bytes(self) -> int:
        began = time.perf_counter()
        persistent = self.weight_bytes + self._nominal_pages * self.page_bytes
        programs = self._largest_steps()
        compile_together(programs)
        taken = [transient_bytes(program.compile(), persistent) for program in programs]
        logger.info("the largest steps: %.1f s until they were compiled", time.perf_counter() - began)
        return max(self._moved_bytes(), *taken)

    def _largest_steps(self) -> list[ProgramToMake]:
        cache = CacheConfig(self.page_size, self._nominal_pages, self.kv_dtype)
        return largest_steps(self.model, self.dtype, cache, self.limits, self.kernels, self.placement)

    @property
    def _nominal_pages(self) -> int:
        """At least one row of a dense cache."""
        row_pages = -(-self.limits.max_model_len // self.page_size)
        return max(NOMINAL_PAGES, row_pages + 1) if self._is_dense else NOMINAL_PAGES

    @property
    def _is_dense(self) -> bool:
        return self.limits.kv_cache in DENSE_CACHES

    @property
    def _itemsize(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    def _room(self, weights: int, step: int) -> int:
        """Pages for which there is room; negative if there is none even for weights and step."""
        free = self.memory - weights - step - int(self.memory * RESERVE_SHARE)
        return free // self.page_bytes

    def _fitting_pages(self, weights: int, step: int) -> int:
        num_pages = self._room(weights, step)
        if num_pages < 2:
            raise ValueError(
                f"the weights take {weights / GIB:.2f} GiB and the largest step {step / GIB:.2f} GiB of "
                f"the {self.memory / GIB:.2f} GiB that they may fill on {self.device.device_kind}, so no page of "
                f"{self.page_bytes} bytes fits beside them: raise memory_utilization, or lower max_num_batched_tokens, "
                "max_num_seqs or page_size"
            )
        return num_pages

    def _moved_bytes(self) -> int:
        """Pages that are on their way between two steps, all layers of them: one a sequence in one launch of
        copy-on-write, or those of a transfer to or from swap space."""
        preemption = self.limits.preemption
        swapped = transfer_bytes(preemption.transfer_pages, self.page_bytes) if preemption.can_swap else 0
        return max(self.limits.max_num_seqs * self.page_bytes, swapped)

    def _least_step_bytes(self) -> int:
        """Fewer bytes than any compiler needs: the logits, or one activation of the widest matrix."""
        logits = self.limits.max_num_seqs * self.model.vocab_size * 4
        widest = max(self.shard.intermediate_size, self.shard.num_heads * self.shard.head_dim)
        return max(logits, self.limits.max_num_batched_tokens * widest * self._itemsize)

    def _most_step_bytes(self) -> int:
        """More bytes than a step takes: float32 logits and token histories, some copies, and activations, kept a while.

        Only says whether measuring could matter, so it may be several times too high.
        """
        model, limits = self.shard, self.limits
        sampling = 8 * limits.max_num_seqs * (model.vocab_size + limits.max_model_len) * 4
        heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
        token = (model.num_layers + 8) * model.hidden_size + 8 * (2 * model.intermediate_size + heads)
        attention = 8 * limits.max_num_seqs * 256 * model.num_heads * model.head_dim * 4
        if self._is_dense:  # XLA's attention copies the rows of a layer
            rows = limits.max_num_seqs * limits.max_model_len
            attention += 4 * rows * model.kv_bytes_per_token(4) // model.num_layers
        return sampling + attention + limits.max_num_batched_tokens * token * self._itemsize + self._moved_bytes()


def coarse(num_pages: int) -> int:
    """Rounded down to a sixty-fourth of the power of two below, so less than 1 of 64 pages is not used."""
    return num_pages - num_pages % max(1, (1 << (num_pages.bit_length() - 1)) // COARSE_PARTS)


def transient_bytes(compiled: jax.stages.Compiled, persistent: int) -> int:
    """What a program takes beyond the `persistent` bytes of weights and pool: inputs, outputs, temporaries, code."""
    memory = compiled.memory_analysis()
    assert memory is not None, "the compiler gave no account of its memory"
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    inputs = memory.argument_size_in_bytes - persistent
    return inputs + outputs + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
