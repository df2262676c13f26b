"""From a checkpoint to a running engine: settles dtype, attention, lengths and the size of the page pool.

What can be refused by arithmetic is refused before weights are read.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxpaged.checkpoint import Checkpoint, load_params
from jaxpaged.config import (
    DENSE_CACHES,
    CacheConfig,
    EngineConfig,
    EngineOptions,
    ModelConfig,
    PreemptionConfig,
    num_dense_rows,
)
from jaxpaged.config.choices import FP8
from jaxpaged.device.attention import AttentionKernels, resolve_attention, resolve_dense_attention
from jaxpaged.device.memory import start_device, usable_memory
from jaxpaged.device.mesh import Placement
from jaxpaged.device.param_nodes import Params
from jaxpaged.device.program_files import keep_programs
from jaxpaged.engine.engine import Engine
from jaxpaged.engine.placing import resolve_placements
from jaxpaged.engine.pool_size import PoolSize, PoolSizer
from jaxpaged.engine.preemption import reserve_swap_space, resolve_preemption
from jaxpaged.engine.runner import StepRunner
from jaxpaged.host.ownership import Ownership

logger = logging.getLogger("jaxpaged")


@dataclass(frozen=True)
class EnginePlan:
    """What an engine will be, settled before there are weights."""

    model: ModelConfig
    limits: EngineConfig  # swap space as it was asked for
    kernels: AttentionKernels
    sizer: PoolSizer
    num_pages: int | None  # None: as many as fit

    def check(self) -> None:
        """Refuse what is known not to fit."""
        self.sizer.check(self.num_pages)
        if self.num_pages is not None and self.limits.kv_cache in DENSE_CACHES:
            num_dense_rows(self.cache_of(self.num_pages), self.limits.max_model_len)

    def pool(self, params: Params | None = None) -> PoolSize:
        """The pool that an engine gets: beside `params`, which are on the device, or as much as these will take."""
        if self.num_pages is None:
            return self.sizer.choose(params)
        return PoolSize(self.num_pages, "as num_pages says")

    def cache_of(self, num_pages: int) -> CacheConfig:
        return CacheConfig(self.sizer.page_size, num_pages, self.sizer.kv_dtype)


def build_engines(
    checkpoint: Checkpoint, options: EngineOptions, weights: Sequence[Params] | None = None,
    owner: Ownership | None = None, mesh: Any = None,
) -> list[Engine]:  # fmt: skip
    """`data_parallel_size` engines, alike but for their devices: one, unless more were asked for.

    Their weights are loaded, or are those given, of each. `owner` is of an LLM, which builds engines again and again,
    and to which all of them together are one; `mesh` names the devices. ValueError, with the numbers, for what cannot
    run there.
    """
    placements = _placements(options, mesh)
    first = build_engine(checkpoint, options, placements[0], weights[0] if weights else None, owner)
    like_the_first = dataclasses.replace(options, num_pages=first.cache_config.num_pages)
    others = [
        build_engine(
            checkpoint, like_the_first, placement, weights[i] if weights else placement.copy(first.params), first.owner
        )
        for i, placement in enumerate(placements[1:], start=1)
    ]
    return [first, *others]


def build_engine(
    checkpoint: Checkpoint, options: EngineOptions, placement: Placement, params: Params | None = None,
    owner: Ownership | None = None,
) -> Engine:  # fmt: skip
    """Load the weights, or take those given, and make the page pool."""
    plan = plan_engine(checkpoint.config, options, placement)
    plan.check()
    sizer = plan.sizer
    if plan.num_pages is None:
        sizer.compile_ahead()
    if params is None:
        params = load_params(
            checkpoint, dtype=sizer.dtype, device=placement, load_format=options.load_format, seed=options.seed
        )
    pool = plan.pool(params)
    cache = plan.cache_of(pool.num_pages)
    if plan.limits.kv_cache != "none":  # which has no pool
        logger.info("pool: %s", sizer.in_words(pool))
    limits = reserve_swap_space(plan.limits, cache, plan.model, placement.device)
    return Engine(StepRunner(params, plan.model, cache, limits, plan.kernels, placement), owner)


def _placements(options: EngineOptions, mesh: Any) -> list[Placement]:
    """The devices of each engine; JAX runs from here on."""
    keep_programs(options.compilation_cache)
    device = start_device(options.memory_utilization)
    return resolve_placements(options.tensor_parallel_size, options.data_parallel_size, mesh, device)


def plan_engine(config: ModelConfig, options: EngineOptions, placement: Placement | None = None) -> EnginePlan:
    """What the options mean for this model on its devices, by default the first ones; ValueError for what cannot run
    there."""
    placement = placement or _placements(options, None)[0]
    device = placement.device
    max_model_len = _max_model_len(options, config)
    model = config.for_length(max_model_len)
    shard = placement.shard(model)
    dtype = resolve_dtype(options.dtype, model, device)
    kv_dtype = FP8 if options.has_fp8_pages else dtype
    kernels = _resolve_kernels(options, shard, device, dtype, kv_dtype)
    preemption = PreemptionConfig()
    if options.kv_cache == "paged":  # who has reserved everything never gives way
        preemption = resolve_preemption(
            options.preemption, options.swap_space_gib, model, options.page_size, jnp.dtype(kv_dtype).itemsize,
            device.platform,
        )  # fmt: skip
    limits = EngineConfig(
        max_model_len, options.max_num_seqs, options.max_num_batched_tokens, options.cascade_attention,
        options.watermark, preemption, options.kv_cache, options.async_scheduling,
        # A CPU is bound by arithmetic: to it a step is as long as its tokens are many, and padding is work.
        options.mixed_steps and device.platform != "cpu",
        options.prefix_caching,
    )  # fmt: skip
    memory = min(usable_memory(each, options.memory_utilization) for each in placement.devices)
    sizer = PoolSizer(model, dtype, kv_dtype, options.page_size, limits, kernels, placement, memory)
    num_pages = 2 if options.kv_cache == "none" and options.num_pages is None else options.num_pages  # it has no pool
    return EnginePlan(model, limits, kernels, sizer, num_pages)


def _resolve_kernels(
    options: EngineOptions, model: ModelConfig, device: jax.Device, dtype: str, kv_dtype: str
) -> AttentionKernels:
    if options.kv_cache in (*DENSE_CACHES, "none"):
        kernels = resolve_dense_attention(options.attention, device, model, dtype)
    else:
        kernels = resolve_attention(
            options.attention, device, head_dim=model.head_dim, page_size=options.page_size, dtype=dtype,
            kv_dtype=kv_dtype, batch_invariant=options.batch_invariant,
        )  # fmt: skip
    can = {
        "cascade_attention": kernels.cascade_decode is not None,
        "batch_invariant": kernels.is_batch_invariant,
    }
    for name, possible in can.items():
        if getattr(options, name) and not possible:
            raise ValueError(
                f"{name}=True needs attention='pallas', but attention={options.attention!r} is {kernels.name!r} "
                f"on {device.device_kind}: leave {name}=False there"
            )
    return kernels


def resolve_dtype(requested: str, model: ModelConfig, device: jax.Device) -> str:
    """ "auto" is the checkpoint's dtype, but float32 on a CPU, which computes 16-bit floats by converting them."""
    if requested != "auto":
        return requested
    resolved = "float32" if device.platform == "cpu" else model.dtype
    logger.info("dtype: 'auto' is %s on %s", resolved, device.device_kind)
    return resolved


def _max_model_len(options: EngineOptions, model: ModelConfig) -> int:
    """Where the rotary embedding depends on the length (dynamic, longrope), more than its original one is only taken
    when asked for, since it changes what short sequences are computed with, too."""
    if options.max_model_len is None:
        if model.default_model_len < model.max_position_embeddings:
            logger.info(
                "max_model_len: %d of %d positions, within which the rotary embedding is not scaled; more if asked for",
                model.default_model_len, model.max_position_embeddings,
            )  # fmt: skip
        return model.default_model_len
    if options.max_model_len > model.max_position_embeddings:
        raise ValueError(
            f"max_model_len={options.max_model_len} exceeds the {model.max_position_embeddings} positions "
            "that the model was made for"
        )
    if options.max_model_len > model.default_model_len:
        logger.info(
            "max_model_len: all sequences, short ones too, are computed with the rotary embedding of %d tokens",
            options.max_model_len,
        )
    return options.max_model_len
