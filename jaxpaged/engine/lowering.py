"""The programs of steps before there are weights or a pool: to learn what they take, or to keep them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxpaged.config import CacheConfig, EngineConfig, ModelConfig
from jaxpaged.device import steps
from jaxpaged.device.attention import AttentionKernels
from jaxpaged.device.dense_cache import make_cache
from jaxpaged.device.mesh import POOL, Placement
from jaxpaged.device.programs import ProgramToMake
from jaxpaged.device.shards import placed_structs
from jaxpaged.host.step.batching import Buckets, StepShape, make_batch, with_copies
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.host.step.step_plan import StepPlan
from jaxpaged.step_io import DecodeBatch, Layout, pack


def largest_steps(
    model: ModelConfig,
    dtype: str,
    cache: CacheConfig,
    limits: EngineConfig,
    kernels: AttentionKernels,
    where: jax.Device | Placement,
) -> list[ProgramToMake]:
    """The largest decode step and the largest one with prompts, with all that ordinary requests ask of the sampler.

    `dtype` is of the weights. Where steps are mixed, one of prompts alone takes no more than one with as many tokens.
    """
    buckets = Buckets.for_limits(limits, cache, kernels.min_rows)
    width = buckets.table_widths[-1]
    features = SamplingFeatures(
        has_samples=True, num_candidates=min(64, model.vocab_size), draws_beams=True,
        is_random=True, is_filtered=True, is_penalised=True, has_masks=True, num_logprobs=min(20, model.vocab_size),
    )  # fmt: skip
    prefill = StepShape(buckets.prefill_rows[-1], width, buckets.prefill_tokens[-1])
    shapes = StepShape(buckets.decode_rows[-1], width), (buckets.mixed_shapes() or [prefill])[-1]
    placement = Placement.of(where)
    return [step_to_make(shape, model, dtype, cache, kernels, features, placement, limits) for shape in shapes]


def step_to_make(
    shape: StepShape,
    model: ModelConfig,
    dtype: str,
    cache: CacheConfig,
    kernels: AttentionKernels,
    features: SamplingFeatures,
    where: jax.sharding.Sharding | Placement,
    limits: EngineConfig | None = None,
) -> ProgramToMake:
    """The program of a step of this shape, before there are weights or a pool: to learn what it takes, or to keep it.

    `dtype` is of the weights, `model` whole. `where` names the device that it is for, or several, `limits` the system
    that keeps KV memory, by default pages.
    """
    placement = Placement.of(where)
    shard = placement.shard(model)
    nothing = StepPlan(is_prefill=shape.num_tokens is not None)
    batch = make_batch(nothing, shape, cache, model.vocab_size, features)
    if isinstance(batch, DecodeBatch) and features.has_samples and kernels.copies_in_steps:
        batch = with_copies(batch, [])
    packed, layout = pack(batch)
    limits = limits or EngineConfig(model.max_position_embeddings)
    pool = jax.eval_shape(lambda: make_cache(shard, cache, limits))
    num_tokens = max(limits.max_num_seqs, shape.num_rows)
    carried = jax.eval_shape(lambda: steps.Carried(jnp.zeros(num_tokens, jnp.int32)))
    params, pool = placed_structs(model, dtype, placement), _lying(pool, placement.lay(POOL))
    carried, packed = _lying((carried, packed), placement.lay())
    static = static_arguments(shard, kernels, layout, features)
    if shape.num_prompts is not None:
        return steps.mixed_step.to_make(params, pool, carried, packed, **static)
    if shape.num_tokens is not None:
        return steps.prefill_step.to_make(params, pool, carried, packed, **static)
    return steps.decode_layers.to_make(params, pool, None, carried, packed, layers=(0, model.num_layers), **static)


def _lying(arrays: Any, layout: jax.sharding.Sharding) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout), arrays)


def static_arguments(
    model: ModelConfig, kernels: AttentionKernels, layout: Layout, features: SamplingFeatures
) -> dict[str, Any]:
    """What the step whose inputs have this layout is compiled for."""
    return {
        "config": model, "kernels": kernels, "layout": layout, "wanted": features.wanted,
        "processors": features.processors,
    }  # fmt: skip
