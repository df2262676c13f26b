"""From a checkpoint's path to a running engine: settles dtype, attention, lengths and the size of the page pool.

What can be refused by arithmetic is refused before weights are read.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxpaged.api.values import as_int, read_flag, read_int, read_number, read_seed, shortened
from jaxpaged.checkpoint import Checkpoint, load_params
from jaxpaged.config import (
    DENSE_CACHES,
    DTYPES,
    KV_CACHES,
    PREEMPTION_MODES,
    CacheConfig,
    EngineConfig,
    ModelConfig,
    PreemptionConfig,
    num_slots,
)
from jaxpaged.device.attention import AttentionKernels, resolve_attention, resolve_dense_attention
from jaxpaged.device.memory import device_memory
from jaxpaged.device.params import Params
from jaxpaged.engine.engine import Engine
from jaxpaged.engine.pool_size import PoolSizer
from jaxpaged.engine.preemption import reserve_swap_space, resolve_preemption
from jaxpaged.host.ownership import Ownership

logger = logging.getLogger("jaxpaged")

#: Ids of pages and slots, and lengths, are 32 bits on the device.
COUNT_MAX = 2**31 - 1


@dataclass(frozen=True)
class EngineOptions:
    """The arguments of `LLM` that shape the engine; see there."""

    dtype: str = "auto"
    load_format: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    page_size: int = 16
    num_pages: int | None = None
    memory_utilization: float = 0.9
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    attention: str = "auto"
    shared_prefixes: bool = False
    preemption: str = "auto"
    swap_space_gib: float = 4.0
    kv_cache: str = "paged"
    watermark: float = 0.01

    def __post_init__(self):
        for name in ("attention", "load_format"):  # which there are is known where they are read
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a name, got {shortened(getattr(self, name))}")
        choices = {"dtype": ("auto", *DTYPES), "preemption": PREEMPTION_MODES, "kv_cache": KV_CACHES}
        for name, known in choices.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise ValueError(f"{name}={shortened(value)}; choose one of {', '.join(known)}")
        if self.kv_cache != "paged" and self.preemption == "swap":
            raise ValueError(
                f"kv_cache={self.kv_cache!r} reserves all that a request needs beforehand, so none gives way: "
                "preemption='swap' needs kv_cache='paged'"
            )
        if self.kv_cache != "paged" and self.shared_prefixes:
            raise ValueError(f"kv_cache={self.kv_cache!r} shares nothing: shared_prefixes=True needs kv_cache='paged'")
        for name in ("page_size", "max_num_seqs", "max_num_batched_tokens", "num_pages", "max_model_len"):
            self._read_count(name, may_be_none=name in ("num_pages", "max_model_len"))
        self._settle("seed", read_seed(self.seed))
        self._settle("shared_prefixes", read_flag("shared_prefixes", self.shared_prefixes))
        self._read_shares()
        if self.preemption == "swap" and self.swap_space_gib == 0:
            raise ValueError(
                "preemption='swap' needs host memory for the pages that it moves, but swap_space_gib=0: give it some "
                "(4 is the default), or choose preemption='recompute'"
            )

    def _read_count(self, name: str, may_be_none: bool) -> None:
        value = getattr(self, name)
        if value is None and may_be_none:
            return
        number = as_int(value)
        if number is None or number < 1:
            raise ValueError(f"{name} must be a positive integer, got {shortened(value)}")
        self._settle(name, read_int(name, number, 1, COUNT_MAX))

    def _read_shares(self) -> None:
        for name, wanted in (("memory_utilization", "in (0, 1]"), ("watermark", "in [0, 1)")):
            self._settle(name, read_number(name, getattr(self, name), 0, 1, wanted))
        if self.memory_utilization == 0:
            raise ValueError("memory_utilization must be in (0, 1], got 0")
        if self.watermark == 1:
            raise ValueError("watermark must be in [0, 1), got 1")
        gib = read_number("swap_space_gib", self.swap_space_gib, 0, float("inf"), "a number of at least 0")
        if gib > COUNT_MAX:
            raise ValueError(f"swap_space_gib must be at most {COUNT_MAX}, got {shortened(self.swap_space_gib)}")
        self._settle("swap_space_gib", gib)

    def _settle(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def build_engine(
    checkpoint: Checkpoint, options: EngineOptions, params: Params | None = None, owner: Ownership | None = None
) -> Engine:
    """Load the weights, or take those given, and make the page pool; ValueError, with the numbers, for what cannot run
    on this device. `owner` is of an LLM that builds several engines, one after the other."""
    device = jax.devices()[0]
    max_model_len = _max_model_len(options, checkpoint.config)
    model = checkpoint.config.for_length(max_model_len)
    dtype = resolve_dtype(options.dtype, model, device)
    kernels = _resolve_kernels(options, model, device, dtype)
    if options.shared_prefixes and kernels.shared_prefix_decode is None:
        raise ValueError(
            f"shared_prefixes=True needs attention='pallas', but attention={options.attention!r} is {kernels.name!r} "
            f"on {device.device_kind}: leave shared_prefixes=False there"
        )
    preemption = PreemptionConfig()
    if options.kv_cache == "paged":  # who has reserved everything never gives way
        preemption = resolve_preemption(
            options.preemption, options.swap_space_gib, model, options.page_size, jnp.dtype(dtype).itemsize,
            device.platform,
        )  # fmt: skip
    limits = EngineConfig(
        max_model_len, options.max_num_seqs, options.max_num_batched_tokens, options.shared_prefixes,
        options.watermark, preemption, options.kv_cache,
    )  # fmt: skip
    memory, _ = device_memory(device)
    sizer = PoolSizer(model, dtype, options.page_size, limits, options.memory_utilization, kernels, device, memory)
    num_pages = 2 if options.kv_cache == "none" and options.num_pages is None else options.num_pages  # it has no pool
    sizer.check(num_pages)
    if num_pages is not None and options.kv_cache in DENSE_CACHES:
        num_slots(CacheConfig(options.page_size, num_pages, dtype), limits.max_model_len)
    if params is None:
        params = load_params(checkpoint, dtype=dtype, device=device, load_format=options.load_format, seed=options.seed)
    num_pages = sizer.choose(params) if num_pages is None else num_pages
    cache = CacheConfig(options.page_size, num_pages, dtype)
    limits = reserve_swap_space(limits, cache, model, device)
    return Engine(params, model, cache, limits, kernels, device, owner)


def _resolve_kernels(options: EngineOptions, model: ModelConfig, device: jax.Device, dtype: str) -> AttentionKernels:
    if options.kv_cache in (*DENSE_CACHES, "none"):
        return resolve_dense_attention(options.attention, device, model, dtype)
    return resolve_attention(
        options.attention, device, head_dim=model.head_dim, page_size=options.page_size, dtype=dtype
    )


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
