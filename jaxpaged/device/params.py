"""The parameter pytree: which tensors a `ModelConfig` has, with their shapes, and how to make random ones.

    embedding              [V, E']            E' = embedding_dim, usually hidden_size
    position_embedding     [positions, E]     only with learned positions
    embedding_in, embedding_out   [E', E], [E, E']   only where E' differs from the hidden size E
    layers                 a tuple, one dict a layer (see `_layer_shapes`); weights are stored [in, out]
    final_norm             {"weight": [E], "bias": [E]}   bias only in layer norm
    lm_head                {"weight": [E', V]}            absent when tied to the embedding

Q, K and V are one matrix, and so are the two halves of a gated MLP: fewer and larger matrix products a step.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxpaged.config import ModelConfig

Params = dict[str, Any]


def param_shapes(config: ModelConfig, dtype: str) -> Params:
    """The pytree of `jax.ShapeDtypeStruct` that `forward` expects for this configuration."""
    tensor = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype))
    hidden, embedded = config.hidden_size, config.embedding_dim
    shapes: Params = {"embedding": tensor((config.vocab_size, embedded))}
    if config.rope is None:
        shapes["position_embedding"] = tensor((config.max_position_embeddings + config.learned_position_offset, hidden))
    if embedded != hidden:
        shapes["embedding_in"] = tensor((embedded, hidden))
        shapes["embedding_out"] = tensor((hidden, embedded))
    shapes["layers"] = tuple(_layer_shapes(config, tensor) for _ in range(config.num_layers))
    if config.has_final_norm:
        shapes["final_norm"] = _norm_shapes(config, hidden, tensor)
    if not config.tie_word_embeddings:
        shapes["lm_head"] = {"weight": tensor((embedded, config.vocab_size))}
    return shapes


def _layer_shapes(config: ModelConfig, tensor) -> Params:
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    layer = {
        "attention_norm": _norm_shapes(config, hidden, tensor),
        "qkv": _linear_shapes(hidden, (config.num_heads + 2 * config.num_kv_heads) * head, config.qkv_bias, tensor),
        "attention_out": _linear_shapes(config.num_heads * head, hidden, config.attention_out_bias, tensor),
        "mlp_norm": _norm_shapes(config, hidden, tensor),
        "mlp_in": _linear_shapes(hidden, inner * (2 if config.gated_mlp else 1), config.mlp_bias, tensor),
        "mlp_out": _linear_shapes(inner, hidden, config.mlp_bias, tensor),
    }
    if config.norm_placement == "sandwich":
        layer["post_attention_norm"] = _norm_shapes(config, hidden, tensor)
        layer["post_mlp_norm"] = _norm_shapes(config, hidden, tensor)
    if config.qk_norm:
        layer["query_norm"] = {"weight": tensor((head,))}
        layer["key_norm"] = {"weight": tensor((head,))}
    return layer


def _norm_shapes(config: ModelConfig, size: int, tensor) -> Params:
    names = ("weight", "bias") if config.norm == "layer" else ("weight",)
    return {name: tensor((size,)) for name in names}


def _linear_shapes(size_in: int, size_out: int, bias: bool, tensor) -> Params:
    weight = {"weight": tensor((size_in, size_out))}
    return {**weight, "bias": tensor((size_out,))} if bias else weight


def random_params(config: ModelConfig, dtype: str, seed: int, device: jax.Device | None = None) -> Params:
    """Random weights of the right shapes, made on the device leaf by leaf: for training and for benchmarks.

    Matrices are normal with standard deviation 0.02 (outputs of a block divided by sqrt(2 * layers), as in GPT-2),
    norms are the identity, biases zero.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(param_shapes(config, dtype))
    # The hardware generator: threefry would take minutes for billions of weights, and nothing depends on these numbers.
    key = jax.random.key(seed & 0xFFFFFFFF, impl="unsafe_rbg")
    if seed >> 32:  # jax would drop these bits of a seed, or refuse it
        key = jax.random.fold_in(key, jnp.uint32(seed >> 32))
    arrays = []
    with jax.default_device(device):
        for i, (path, leaf) in enumerate(leaves):
            names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
            arrays.append(_random_leaf(names, leaf, jax.random.fold_in(key, i), config))
    return jax.tree_util.tree_unflatten(treedef, arrays)


def _random_leaf(names: list[str], leaf: jax.ShapeDtypeStruct, key: jax.Array, config: ModelConfig) -> jax.Array:
    if names[-1] == "bias":
        return jnp.zeros(leaf.shape, leaf.dtype)
    if any(name.endswith("norm") for name in names):
        return jnp.full(leaf.shape, 1.0 - config.norm_offset, leaf.dtype)
    std = 0.02
    if any(name in ("attention_out", "mlp_out") for name in names):
        std /= (2 * config.num_layers) ** 0.5
    return _normal(key, leaf.shape, leaf.dtype, std)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, std: float) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * jnp.asarray(std, dtype)
