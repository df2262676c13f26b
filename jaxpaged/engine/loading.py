"""From a checkpoint's path to a running engine: settles dtype, attention, lengths and the size of the page pool.

What can be refused by arithmetic is refused before weights are read.
"""

from __future__ import annotations

import logging

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
from jaxpaged.device.param_nodes import Params
from jaxpaged.device.program_files import keep_programs
from jaxpaged.engine.engine import Engine
from jaxpaged.engine.pool_size import PoolSizer
from jaxpaged.engine.preemption import reserve_swap_space, resolve_preemption
from jaxpaged.engine.runner import StepRunner
from jaxpaged.host.ownership import Ownership

logger = logging.getLogger("jaxpaged")


def build_engine(
    checkpoint: Checkpoint, options: EngineOptions, params: Params | None = None, owner: Ownership | None = None
) -> Engine:
    """Load the weights, or take those given, and make the page pool; ValueError, with the numbers, for what cannot run
    on this device. `owner` is of an LLM that builds several engines, one after the other."""
    keep_programs(options.compilation_cache)
    device = start_device(options.memory_utilization)
    max_model_len = _max_model_len(options, checkpoint.config)
    model = checkpoint.config.for_length(max_model_len)
    dtype = resolve_dtype(options.dtype, model, device)
    kv_dtype = FP8 if options.has_fp8_pages else dtype
    kernels = _resolve_kernels(options, model, device, dtype, kv_dtype)
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
    memory = usable_memory(device, options.memory_utilization)
    sizer = PoolSizer(model, dtype, kv_dtype, options.page_size, limits, kernels, device, memory)
    num_pages = 2 if options.kv_cache == "none" and options.num_pages is None else options.num_pages  # it has no pool
    sizer.check(num_pages)
    if num_pages is not None and options.kv_cache in DENSE_CACHES:
        num_dense_rows(CacheConfig(options.page_size, num_pages, kv_dtype), limits.max_model_len)
    if num_pages is None:
        sizer.compile_ahead()
    if params is None:
        params = load_params(checkpoint, dtype=dtype, device=device, load_format=options.load_format, seed=options.seed)
    num_pages = sizer.choose(params) if num_pages is None else num_pages
    cache = CacheConfig(options.page_size, num_pages, kv_dtype)
    limits = reserve_swap_space(limits, cache, model, device)
    return Engine(StepRunner(params, model, cache, limits, kernels, device), owner)


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
