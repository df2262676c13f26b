"""The transformer, once, for every family and every cache.

    hidden, cache = forward(params, config, tokens, positions, cache, attend)
    logits = compute_logits(params, config, hidden)

Tokens are a flat axis [T]: the rows of a decode step, the packed chunks of a prefill, or a training batch laid end to
end. Only attention relates tokens to one another, and attention is the caller's: `attend(cache, layer, heads)` makes
q [T, H, D] and k, v [T, K, D] of a layer's `Heads` and returns ([T, H, D], cache). So the model knows no cache: a paged
cache, a dense one and no cache at all run the same code. `layer` is a Python int: layers are unrolled, because a scan
copies weights and caches.

Between two products stands a residual sum with its norm, which a caller may have a kernel for (`add_norm`).

Norms, rotary embedding and softmax inputs are computed in float32, as the families' reference implementations do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxpaged.config import ModelConfig
from jaxpaged.device.heads import Heads
from jaxpaged.device.mesh import AXIS, add_up, side_by_side
from jaxpaged.device.norms import AddNorm, add_and_norm, norm
from jaxpaged.device.param_nodes import Layer, Linear, Params
from jaxpaged.device.rope import rotation_at
from pallas_kernels import layer_reference
from pallas_kernels.layer_reference import HeadNorms

Array = jax.Array
Cache = TypeVar("Cache")
Attend = Callable[[Cache, int, Heads], tuple[Array, Cache]]


def forward(
    params: Params, config: ModelConfig, tokens: Array, positions: Array, cache: Cache, attend: Attend,
    add_norm: AddNorm = layer_reference.add_norm,
) -> tuple[Array, Cache]:  # fmt: skip
    """tokens i32[T], positions i32[T] (each in its own sequence) -> hidden [T, E'] ready for the head, cache."""
    x = embed(params, config, tokens, positions)
    x, cache = run_layers(params.layers, config, x, positions, cache, attend, add_norm)
    return finish(params, config, x), cache


def embed(params: Params, config: ModelConfig, tokens: Array, positions: Array) -> Array:
    """i32[T], i32[T] -> [T, E], what the first layer reads."""
    with jax.named_scope("embed"):
        return _embed(params, config, tokens, positions)


def run_layers(
    layers: Sequence[Layer],
    config: ModelConfig,
    x: Array,
    positions: Array,
    cache: Cache,
    attend: Attend,
    add_norm: AddNorm = layer_reference.add_norm,
    first: int = 0,
) -> tuple[Array, Cache]:
    """x [T, E] through some of the model's layers, of which the first is layer `first` -> [T, E], cache."""
    stream = Stream(x, None)
    for layer, weights in enumerate(layers, first):
        with jax.named_scope(f"layer_{layer}"):
            stream, cache = _block(weights, config, layer, stream, positions, cache, attend, add_norm)
    return stream.x if stream.h is None else stream.x + stream.h, cache


class Stream(NamedTuple):
    """What runs through the layers: x [T, E], and what the block before has still to add to it."""

    x: Array
    h: Array | None


def finish(params: Params, config: ModelConfig, x: Array) -> Array:
    """[T, E] behind the last layer -> hidden [T, E'] ready for the head."""
    if params.final_norm is not None:
        x = norm(params.final_norm, config, x)
    if params.embedding_out is not None:
        x = _matmul(x, params.embedding_out)
    return x


def compute_logits(params: Params, config: ModelConfig, hidden: Array) -> Array:
    """hidden [R, E'] -> logits f32[R, V]."""
    with jax.named_scope("logits"):
        if params.lm_head is None:
            logits = jnp.einsum("re,ve->rv", hidden, params.embedding, **_product_options(hidden, jnp.float32))
        else:
            logits = jnp.matmul(hidden, params.lm_head.weight, **_product_options(hidden, jnp.float32))
        logits = soft_cap(logits, config.final_soft_cap)
        # Whole rows on every device, so that each chooses as one device would. The last shard's are padded.
        return logits if config.num_shards == 1 else side_by_side(logits, config)[:, : config.vocab_size]


def soft_cap(x: Array, cap: float | None) -> Array:
    """cap * tanh(x / cap): bounds logits smoothly (Gemma 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _embed(params: Params, config: ModelConfig, tokens: Array, positions: Array) -> Array:
    x = params.embedding[tokens] if config.num_shards == 1 else _look_up(params.embedding, tokens, config)
    if config.embedding_scale != 1.0:
        x = x * jnp.asarray(config.embedding_scale, x.dtype)  # rounded to the weights' dtype, as Gemma was trained
    if params.embedding_in is not None:
        x = _matmul(x, params.embedding_in)
    if params.position_embedding is not None:
        x = x + params.position_embedding[positions + config.learned_position_offset]
    return x


def _look_up(embedding: Array, tokens: Array, config: ModelConfig) -> Array:
    """The rows of tokens, each of which one shard has: the others add zeros."""
    rows = len(embedding)
    at = tokens - jax.lax.axis_index(AXIS) * rows
    is_here = (at >= 0) & (at < rows)
    return add_up(jnp.where(is_here[:, None], embedding[jnp.where(is_here, at, 0)], 0), config)


def _block(
    weights: Layer, config: ModelConfig, layer: int, stream: Stream, positions: Array, cache, attend: Attend,
    add_norm: AddNorm,
):  # fmt: skip
    """One attention and one feed-forward block, each with its residual; the three norm placements differ only here."""

    def attention(x: Array) -> Array:
        nonlocal cache
        h, cache = _attention(weights, config, layer, x, positions, cache, attend)
        return h if weights.post_attention_norm is None else norm(weights.post_attention_norm, config, h)

    def mlp(x: Array) -> Array:
        h = _mlp(weights, config, x)
        return h if weights.post_mlp_norm is None else norm(weights.post_mlp_norm, config, h)

    add_then_norm = functools.partial(add_and_norm, config=config, add_norm=add_norm)
    if config.norm_placement == "post":
        assert stream.h is None, "behind a norm nothing is left to add"
        _, x = add_then_norm(weights.attention_norm, x=stream.x, h=attention(stream.x))
        _, x = add_then_norm(weights.mlp_norm, x=x, h=mlp(x))
        return Stream(x, None), cache
    x, h = add_then_norm(weights.attention_norm, x=stream.x, h=stream.h)
    x, h = add_then_norm(weights.mlp_norm, x=x, h=attention(h))
    return Stream(x, mlp(h)), cache


def _attention(weights: Layer, config: ModelConfig, layer: int, x: Array, positions: Array, cache, attend: Attend):
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    projected = _linear(weights.qkv, x).reshape(x.shape[0], heads + 2 * kv_heads, head_dim)
    norms = rotation = None
    if weights.query_norm is not None and weights.key_norm is not None:
        query, key = weights.query_norm.weight, weights.key_norm.weight
        norms = HeadNorms(query, key, config.norm_eps, config.norm_offset)
    if (rope := config.rope_of(layer)) is not None:
        rotation = rotation_at(positions, rope, head_dim)
    out, cache = attend(cache, layer, Heads(projected, kv_heads, rotation, norms))
    return _linear_in_shards(weights.attention_out, config, out.reshape(x.shape[0], heads * head_dim)), cache


def _mlp(weights: Layer, config: ModelConfig, x: Array) -> Array:
    h = _linear(weights.mlp_in, x)
    if config.gated_mlp:
        gate, up = jnp.split(h, 2, axis=-1)
        h = _activate(config, gate) * up
    else:
        h = _activate(config, h)
    return _linear_in_shards(weights.mlp_out, config, h)


def _activate(config: ModelConfig, x: Array) -> Array:
    match config.activation:
        case "silu":
            return jax.nn.silu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)
        case "relu":
            return jax.nn.relu(x)


def _linear(weights: Linear, x: Array) -> Array:
    y = _matmul(x, weights.weight)
    return y if weights.bias is None else y + weights.bias


def _linear_in_shards(weights: Linear, config: ModelConfig, x: Array) -> Array:
    """Of an x of which each shard has some columns, and of the weights the rows that go with them."""
    y = add_up(_matmul(x, weights.weight), config)
    return y if weights.bias is None else y + weights.bias


def _matmul(x: Array, weight: Array) -> Array:
    return jnp.matmul(x, weight, **_product_options(x, x.dtype))


def _product_options(x: Array, out_dtype) -> dict:
    """float32 means float32: without "highest", GPUs multiply it in TF32, and results differ between devices."""
    precision = "highest" if x.dtype == jnp.float32 else None
    return {"precision": precision, "preferred_element_type": out_dtype}
