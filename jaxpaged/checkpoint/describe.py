"""`jaxpaged info`: what a checkpoint holds and how many tokens fit beside it, from its configuration alone."""

from __future__ import annotations

import math
from pathlib import Path

import jax

from jaxpaged.checkpoint.opening import Checkpoint, open_checkpoint
from jaxpaged.config import EngineOptions, ModelConfig
from jaxpaged.config.choices import FP8
from jaxpaged.device.memory import device_memory
from jaxpaged.device.params import param_shapes

GIB = 1 << 30
MEMORY_UTILIZATION = 0.9  # as in LLM: the rest is for activations and the runtime


def describe_checkpoint(path: str | Path, device: jax.Device | None = None, kv_cache_dtype: str = "auto") -> str:
    """Lines of "what: value" about the checkpoint at `path`; no weight is read."""
    checkpoint = open_checkpoint(path)
    facts = measure_checkpoint(checkpoint, device or jax.devices()[0], EngineOptions(kv_cache_dtype=kv_cache_dtype))
    width = max(map(len, facts)) + 2
    return "\n".join(f"{name + ':':<{width}}{value}" for name, value in facts.items())


def measure_checkpoint(checkpoint: Checkpoint, device: jax.Device, options: EngineOptions) -> dict[str, str]:
    config = checkpoint.config
    count = count_params(config)
    itemsize = jax.numpy.dtype(config.dtype).itemsize
    kv_dtype = FP8 if options.has_fp8_pages else config.dtype
    kv_bytes = config.kv_bytes_per_token(jax.numpy.dtype(kv_dtype).itemsize)
    memory, memory_name = device_memory(device)
    num_tokens = max(0, int(memory * MEMORY_UTILIZATION) - count * itemsize) // kv_bytes
    tokenizer = checkpoint.tokenizer_file.name if checkpoint.tokenizer_file else "none: prompts must be token ids"
    return {
        "format": checkpoint.format,
        "family": config.family,
        "layers": f"{config.num_layers} of {config.hidden_size}, feed-forward {config.intermediate_size}",
        "heads": f"{config.num_heads} query, {config.num_kv_heads} key-value, of {config.head_dim}",
        "attention": _describe_windows(config),
        "vocabulary": f"{config.vocab_size:,}",
        "positions": f"{config.max_position_embeddings:,}",
        "parameters": f"{count:,}",
        "weights": f"{_bytes(count * itemsize)} as {config.dtype}",
        "KV per token": f"{_bytes(kv_bytes)} as {kv_dtype}",
        "tokens that fit": f"{num_tokens:,} in {MEMORY_UTILIZATION:.0%} of {_bytes(memory)} ({memory_name})",
        "tokenizer": tokenizer,
    }


def count_params(config: ModelConfig) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(config, config.dtype)))


def _describe_windows(config: ModelConfig) -> str:
    sliding = sum(config.is_sliding(layer) for layer in range(config.num_layers))
    if not sliding:
        return "full"
    window = f"a window of {config.sliding_window:,} tokens"
    return window if sliding == config.num_layers else f"{window} in {sliding} of {config.num_layers} layers, else full"


def _bytes(count: int) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
