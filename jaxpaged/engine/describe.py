"""`jaxpaged info`: what a checkpoint holds, and the engine that would be made of it, from its configuration alone."""

from __future__ import annotations

import math
from pathlib import Path

import jax

from jaxpaged.checkpoint import Checkpoint, open_checkpoint
from jaxpaged.config import DENSE_CACHES, EngineOptions, ModelConfig, num_dense_rows
from jaxpaged.device.params import param_shapes
from jaxpaged.engine.loading import EnginePlan, plan_engine

GIB = 1 << 30
DEFAULTS = EngineOptions()


def describe_checkpoint(path: str | Path, options: EngineOptions = DEFAULTS) -> str:
    """Lines of "what: value" about the checkpoint at `path`, in an engine with these options; no weight is read.

    ValueError for options with which there would be no engine; a model that is too large for the device is described.
    """
    checkpoint = open_checkpoint(path)
    facts = measure_checkpoint(checkpoint, plan_engine(checkpoint.config, options))
    width = max(map(len, facts)) + 2
    return "\n".join(f"{name + ':':<{width}}{value}" for name, value in facts.items())


def measure_checkpoint(checkpoint: Checkpoint, plan: EnginePlan) -> dict[str, str]:
    config, sizer = checkpoint.config, plan.sizer
    count = count_params(config)
    stored = "" if sizer.dtype == config.dtype else f" ({config.dtype} in the checkpoint)"
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
        **_describe_devices(sizer.placement.size),
        "weights": f"{_bytes(sizer.weight_bytes)} as {sizer.dtype}{stored}",
        "KV per token": f"{_bytes(sizer.page_bytes // sizer.page_size)} as {sizer.kv_dtype}",
        **_describe_pool(plan),
        "tokenizer": tokenizer,
    }


def count_params(config: ModelConfig) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(config, config.dtype)))


def _describe_devices(count: int) -> dict[str, str]:
    return {} if count == 1 else {"devices": f"{count}; weights and KV below are what each of them holds"}


def _describe_pool(plan: EnginePlan) -> dict[str, str]:
    """The pool that the engine would have, and what fits it; why there would be none, if so."""
    limits = plan.limits
    limits_in_words = f"{limits.max_model_len:,} tokens a sequence at most, {limits.max_num_seqs:,} sequences at a time"
    if limits.kv_cache == "none":
        return {"limits": limits_in_words, "pool": "none: every step computes all tokens", "tokens that fit": "0"}
    try:
        plan.check()
        pool = plan.pool()
        cache = plan.cache_of(pool.num_pages)
        num_tokens = cache.num_usable_tokens
        if limits.kv_cache in DENSE_CACHES:
            num_tokens = num_dense_rows(cache, limits.max_model_len) * limits.max_model_len
    except ValueError as error:
        return {"limits": limits_in_words, "pool": f"none: {error}", "tokens that fit": "0"}
    size = f"{_bytes(pool.num_pages * plan.sizer.page_bytes)}: {pool.reason}"
    return {
        "limits": limits_in_words,
        "pool": f"{pool.num_pages:,} pages of {cache.page_size} tokens, {size}",
        "tokens that fit": f"{num_tokens:,}",
    }


def _describe_windows(config: ModelConfig) -> str:
    sliding = sum(config.is_sliding(layer) for layer in range(config.num_layers))
    if not sliding:
        return "full"
    window = f"a window of {config.sliding_window:,} tokens"
    if config.window is not None:
        return f"{window}; pages that it does not reach are given back"
    return f"{window} in {sliding} of {config.num_layers} layers, else full"


def _bytes(count: int) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
