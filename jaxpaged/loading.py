"""From a checkpoint's path to a running engine: settles dtype, attention, lengths and the size of the page pool.

Everything that can be refused is refused before weights are read.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxpaged.checkpoint import Checkpoint, load_params
from jaxpaged.config import DTYPES, CacheConfig, EngineConfig, ModelConfig
from jaxpaged.device.attention import resolve_attention
from jaxpaged.device.memory import device_memory
from jaxpaged.device.params import param_shapes
from jaxpaged.engine import Engine

logger = logging.getLogger("jaxpaged")

GIB = 1 << 30
#: Without num_pages, a pool in main memory takes no more than this: other programs live there too.
CPU_POOL_BYTES = 1 * GIB
#: Rows that the float32 logits and the activations of the largest step are counted for.
WORKSPACE_COPIES = 4


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
    preemption: str = "auto"
    swap_space_gib: float = 4.0

    def __post_init__(self):
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}; choose one of auto, {', '.join(DTYPES)}")
        if self.preemption not in ("auto", "recompute"):
            raise ValueError(
                f"preemption={self.preemption!r}; this version knows 'recompute' and 'auto' (which is the same)"
            )
        for name in ("page_size", "max_num_seqs", "max_num_batched_tokens", "num_pages", "max_model_len"):
            value = getattr(self, name)
            if value is None and name in ("num_pages", "max_model_len"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, got {self.seed!r}")
        if not 0 < self.memory_utilization <= 1:
            raise ValueError(f"memory_utilization must be in (0, 1], got {self.memory_utilization}")
        if self.swap_space_gib < 0:
            raise ValueError(f"swap_space_gib must be at least 0, got {self.swap_space_gib}")


def build_engine(checkpoint: Checkpoint, options: EngineOptions) -> Engine:
    """Load the weights and make the page pool; ValueError, with the numbers, for what cannot run on this device."""
    device = jax.devices()[0]
    model = checkpoint.config
    dtype = resolve_dtype(options.dtype, model, device)
    kernels = resolve_attention(options.attention, device)
    max_model_len = _max_model_len(options, model)
    weight_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(param_shapes(model, dtype)))
    cache = CacheConfig(
        options.page_size, _num_pages(options, model, dtype, max_model_len, weight_bytes, device), dtype
    )
    limits = EngineConfig(max_model_len, options.max_num_seqs, options.max_num_batched_tokens)
    params = load_params(checkpoint, dtype=dtype, device=device, load_format=options.load_format, seed=options.seed)
    return Engine(params, model, cache, limits, kernels, device)


def resolve_dtype(requested: str, model: ModelConfig, device: jax.Device) -> str:
    """ "auto" is the checkpoint's dtype, but float32 on a CPU, which computes 16-bit floats by converting them."""
    if requested != "auto":
        return requested
    resolved = "float32" if device.platform == "cpu" else model.dtype
    logger.info("dtype: 'auto' is %s on %s", resolved, device.device_kind)
    return resolved


def _max_model_len(options: EngineOptions, model: ModelConfig) -> int:
    if options.max_model_len is None:
        return model.max_position_embeddings
    if options.max_model_len > model.max_position_embeddings:
        raise ValueError(
            f"max_model_len={options.max_model_len} exceeds the {model.max_position_embeddings} positions "
            "that the model was made for"
        )
    return options.max_model_len


def _num_pages(
    options: EngineOptions, model: ModelConfig, dtype: str, max_model_len: int, weight_bytes: int, device: jax.Device
) -> int:
    """Pages of the pool, NULL_PAGE included: as asked for, or as many as fit beside the weights and are of use."""
    page_bytes = options.page_size * model.kv_bytes_per_token(jnp.dtype(dtype).itemsize)
    memory, _ = device_memory(device)
    free = int(memory * options.memory_utilization) - weight_bytes - _workspace_bytes(options, model, dtype)
    if options.num_pages is not None:
        if weight_bytes + options.num_pages * page_bytes > memory:
            raise ValueError(
                f"num_pages={options.num_pages} pages take {options.num_pages * page_bytes / GIB:.2f} GiB and the "
                f"weights {weight_bytes / GIB:.2f} GiB; {device.device_kind} has {memory / GIB:.2f} GiB: at most about "
                f"{max(0, memory - weight_bytes) // page_bytes} pages fit"
            )
        return CacheConfig(options.page_size, options.num_pages, dtype).num_pages
    useful = options.max_num_seqs * -(-max_model_len // options.page_size) + 1
    if device.platform == "cpu":
        free = min(free, CPU_POOL_BYTES)
    num_pages = min(useful, free // page_bytes)
    if num_pages < 2:
        raise ValueError(
            f"the weights take {weight_bytes / GIB:.2f} GiB of {memory / GIB:.2f} GiB on {device.device_kind}; with "
            f"memory_utilization={options.memory_utilization} no page of {page_bytes} bytes fits beside them: raise "
            "memory_utilization, or lower max_num_batched_tokens or page_size"
        )
    return num_pages


def _workspace_bytes(options: EngineOptions, model: ModelConfig, dtype: str) -> int:
    """A bound on a step's temporaries: float32 logits of every row, and the widest activations of every token."""
    itemsize = jnp.dtype(dtype).itemsize
    widest = max(2 * model.intermediate_size, (model.num_heads + 2 * model.num_kv_heads) * model.head_dim)
    activations = options.max_num_batched_tokens * (2 * model.hidden_size + 2 * widest) * itemsize
    return WORKSPACE_COPIES * (options.max_num_seqs * model.vocab_size * 4) + activations
