"""The model that train_tiny.py trains: a Llama as a flax.nnx module, and its way into our parameters.

    model = Llama(config, rngs=nnx.Rngs(0))
    logits = model(tokens)                     i32[B, T] -> f32[B, T, V]
    params = to_params(model, config)          what device/model.forward computes the same with

Modules are named as in a Hugging Face checkpoint, so the records of the parameters say what of them makes each of ours.
Inference has no such module: a step that took nnx.State would cost the host thousands of calls before it is launched.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from jaxpaged.config import ModelConfig
from jaxpaged.device.param_nodes import Params, by_name
from jaxpaged.device.params import param_records, stored_names
from jaxpaged.device.rope import rotation_at
from pallas_kernels.layer_reference import rotate

Array = jax.Array

#: Of `ModelConfig`, what this module computes; anything else must be as it is by default.
COMPUTED = {
    "family", "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    "max_position_embeddings", "norm_eps", "qk_norm", "mlp_bias", "qkv_bias", "attention_out_bias", "rope",
    "tie_word_embeddings", "bos_token_id", "eos_token_ids", "dtype",
}  # fmt: skip
#: What nnx calls the arrays of its modules -> what checkpoints of Hugging Face call them.
STORED_AS = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


class Llama(nnx.Module):
    """Parameters in float32; computes in `dtype`, but for norms and logits."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: str = "float32"):
        check(config)
        table = functools.partial(nnx.Embed, embedding_init=nnx.initializers.normal(0.02), dtype=dtype, rngs=rngs)
        self.embed_tokens = table(config.vocab_size, config.hidden_size)
        self.layers = nnx.List([Block(config, dtype, rngs) for _ in range(config.num_layers)])
        self.norm = norm(config, config.hidden_size, dtype, rngs)
        self.lm_head = (
            None if config.tie_word_embeddings else linear(config.hidden_size, config.vocab_size, False, dtype, rngs)
        )

    def __call__(self, tokens: Array) -> Array:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        head = self.embed_tokens.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]
        return jnp.matmul(x, head.astype(x.dtype), preferred_element_type=jnp.float32)


class Block(nnx.Module):
    def __init__(self, config: ModelConfig, dtype: str, rngs: nnx.Rngs):
        self.input_layernorm = norm(config, config.hidden_size, dtype, rngs)
        self.self_attn = Attention(config, dtype, rngs)
        self.post_attention_layernorm = norm(config, config.hidden_size, dtype, rngs)
        self.mlp = GatedMLP(config, dtype, rngs)

    def __call__(self, x: Array) -> Array:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, dtype: str, rngs: nnx.Rngs):
        hidden, heads = config.hidden_size, config.num_heads * config.head_dim
        kv_heads = config.num_kv_heads * config.head_dim
        assert config.rope is not None
        self.rope, self.head_dim = config.rope, config.head_dim
        self.q_proj = linear(hidden, heads, config.qkv_bias, dtype, rngs)
        self.k_proj = linear(hidden, kv_heads, config.qkv_bias, dtype, rngs)
        self.v_proj = linear(hidden, kv_heads, config.qkv_bias, dtype, rngs)
        self.o_proj = linear(heads, hidden, config.attention_out_bias, dtype, rngs, residual_std(config))
        self.q_norm = norm(config, config.head_dim, dtype, rngs) if config.qk_norm else None
        self.k_norm = norm(config, config.head_dim, dtype, rngs) if config.qk_norm else None

    def __call__(self, x: Array) -> Array:
        rows, length, _ = x.shape
        q, k, v = (
            project(x).reshape(rows, length, -1, self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        rotation = rotation_at(jnp.arange(length), self.rope, self.head_dim)
        rotated = jax.vmap(lambda heads: rotate(heads, rotation))
        out = jax.nn.dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        return self.o_proj(out.reshape(rows, length, -1))


class GatedMLP(nnx.Module):
    def __init__(self, config: ModelConfig, dtype: str, rngs: nnx.Rngs):
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = linear(hidden, inner, config.mlp_bias, dtype, rngs)
        self.up_proj = linear(hidden, inner, config.mlp_bias, dtype, rngs)
        self.down_proj = linear(inner, hidden, config.mlp_bias, dtype, rngs, residual_std(config))

    def __call__(self, x: Array) -> Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


def linear(size_in: int, size_out: int, has_bias: bool, dtype: str, rngs: nnx.Rngs, std: float = 0.02) -> nnx.Linear:
    init = nnx.initializers.normal(std)
    return nnx.Linear(size_in, size_out, use_bias=has_bias, kernel_init=init, dtype=dtype, rngs=rngs)


def norm(config: ModelConfig, size: int, dtype: str, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(size, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)


def residual_std(config: ModelConfig) -> float:
    """Of what is added to the residual stream, as in GPT-2."""
    return 0.02 / (2 * config.num_layers) ** 0.5


def check(config: ModelConfig) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(config) if field.name not in COMPUTED}
    other = [f"{name}={getattr(config, name)!r}" for name in defaults if getattr(config, name) != defaults[name]]
    if config.rope is None:
        other.append("rope=None")
    if other:
        raise ValueError(f"this module is a Llama, and does not compute {', '.join(other)}")


def to_params(model: Llama, config: ModelConfig) -> Params:
    """The module's arrays as our parameters, in float32: those that we have as one are laid side by side."""
    state = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    stored: dict[str, Any] = {
        ".".join((*map(str, path), STORED_AS[leaf])): array for (*path, leaf), array in state.items()
    }
    records = param_records(config)
    arrays = [
        jnp.concatenate([stored[part] for part in stored_names(name, record)], axis=-1)
        for name, record in by_name(records).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(records), arrays)
