"""The record of each parameter: all that is known of it before there are weights, once.

`param_records(config)` has a `Tensor` at the place of each array of `Params`: its shape, how a random one is made, the
logical names of its axes, and what it is in a checkpoint. Shapes, random weights and the readers of checkpoints follow
from it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpaged.config import ModelConfig
from jaxpaged.device.param_nodes import Array, Layer, Linear, Norm, Params

Shape = tuple[int, ...]
#: (key, shape, dtype) -> a random tensor, or one that is always the same.
Initialiser = Callable[[Array, Shape, Any], Array]


class Part(NamedTuple):
    """What checkpoints of Hugging Face keep as one tensor, and we beside others along the last axis."""

    module: str  # that has it, as Llama names it, or who first had what Llama has not; below "layers.N." in a layer
    axis: str  # the logical name of the last axis, of this part
    width: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The record of a parameter. Its place in `Params` is its name in native checkpoints ("layers.3.qkv.weight").

    Attributes:
        shape: as we hold it.
        axes: a logical name an axis, of what one would divide among devices.
        init: makes a random one.
        parts: what is laid side by side along the last axis; most tensors are one part.
        is_transposed: whether checkpoints of Hugging Face have a part as [out, in].
    """

    shape: Shape
    axes: tuple[str, ...]
    init: Initialiser
    parts: tuple[Part, ...]
    is_transposed: bool = False


def param_records(config: ModelConfig) -> Params:
    """The `Tensor` of every parameter that a model of this configuration has."""
    hidden, embedded, normal = config.hidden_size, config.embedding_dim, _normal(config)
    embed, project = Part("embed_tokens", "embed", embedded), embedded != hidden
    positions = config.max_position_embeddings + config.learned_position_offset
    return Params(
        embedding=_table("vocab", config.num_vocab_rows, embed, normal),
        embedding_in=_matrix("embed", embedded, (Part("project_in", "embed", hidden),), normal) if project else None,
        embedding_out=_matrix("embed", hidden, (embed._replace(module="project_out"),), normal) if project else None,
        final_norm=_norm(config, "norm") if config.has_final_norm else None,
        layers=(_layer(config),) * config.num_layers,
        lm_head=None if config.tie_word_embeddings else _linear(
            "embed", embedded, (Part("lm_head", "vocab", config.num_vocab_rows),), False, normal
        ),
        position_embedding=None if config.rope is not None else _table(
            "position", positions, Part("embed_positions", "embed", hidden), normal
        ),
    )  # fmt: skip


def _layer(config: ModelConfig) -> Layer:
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner, normal = config.hidden_size, config.intermediate_size, _normal(config)
    qkv = (
        Part("self_attn.q_proj", "heads", heads),
        Part("self_attn.k_proj", "kv_heads", kv_heads),
        Part("self_attn.v_proj", "kv_heads", kv_heads),
    )
    up = Part("mlp.up_proj", "mlp", inner)
    mlp_in = (Part("mlp.gate_proj", "mlp", inner), up) if config.gated_mlp else (up,)
    attention_out = (Part("self_attn.o_proj", "embed", hidden),)
    residual = _normal(config, is_residual=True)
    is_sandwich = config.norm_placement == "sandwich"
    return Layer(
        attention_norm=_norm(config, "input_layernorm"),
        attention_out=_linear("heads", heads, attention_out, config.attention_out_bias, residual),
        key_norm=_head_norm(config, "self_attn.k_norm") if config.qk_norm else None,
        mlp_in=_linear("embed", hidden, mlp_in, config.mlp_bias, normal),
        mlp_norm=_norm(config, "post_attention_layernorm"),
        mlp_out=_linear("mlp", inner, (Part("mlp.down_proj", "embed", hidden),), config.mlp_bias, residual),
        post_attention_norm=_norm(config, "post_self_attn_layernorm") if is_sandwich else None,  # as in GLM 4
        post_mlp_norm=_norm(config, "post_mlp_layernorm") if is_sandwich else None,
        qkv=_linear("embed", hidden, qkv, config.qkv_bias, normal),
        query_norm=_head_norm(config, "self_attn.q_norm") if config.qk_norm else None,
    )


def _table(axis: str, rows: int, part: Part, init: Initialiser) -> Any:
    """Rows are looked up: checkpoints have it as it is used."""
    return Tensor((rows, part.width), (axis, part.axis), init, (part,))


def _matrix(axis: str, rows: int, parts: tuple[Part, ...], init: Initialiser) -> Any:
    return Tensor((rows, _width(parts)), (axis, _last_axis(parts)), init, parts, is_transposed=True)


def _linear(axis: str, rows: int, parts: tuple[Part, ...], has_bias: bool, init: Initialiser) -> Linear:
    bias: Any = Tensor((_width(parts),), (_last_axis(parts),), _constant(0.0), parts) if has_bias else None
    return Linear(weight=_matrix(axis, rows, parts, init), bias=bias)


def _norm(config: ModelConfig, module: str) -> Norm:
    weight = _norm_weight(config, Part(module, "embed", config.hidden_size))
    bias: Any = dataclasses.replace(weight, init=_constant(0.0)) if config.norm == "layer" else None
    return Norm(weight=weight, bias=bias)


def _head_norm(config: ModelConfig, module: str) -> Norm:
    return Norm(weight=_norm_weight(config, Part(module, "head_dim", config.head_dim)))


def _norm_weight(config: ModelConfig, part: Part) -> Any:
    return Tensor((part.width,), (part.axis,), _constant(1.0 - config.norm_offset), (part,))


def _width(parts: tuple[Part, ...]) -> int:
    return sum(part.width for part in parts)


def _last_axis(parts: tuple[Part, ...]) -> str:
    """The parts' own name, or "qkv" where they differ: each part is divided by itself."""
    axes = {part.axis for part in parts}
    return axes.pop() if len(axes) == 1 else "qkv"


def _constant(value: float) -> Initialiser:
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


def _normal(config: ModelConfig, is_residual: bool = False) -> Initialiser:
    """Standard deviation 0.02; outputs of a block divided by sqrt(2 * layers), as in GPT-2."""
    std = 0.02 / (2 * config.num_layers) ** 0.5 if is_residual else 0.02
    return lambda key, shape, dtype: _random_normal(key, shape, dtype, std)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_normal(key: Array, shape: Shape, dtype: Any, std: float) -> Array:
    return jax.random.normal(key, shape, dtype) * jnp.asarray(std, dtype)


def param_shapes(config: ModelConfig, dtype: str) -> Params:
    """The `jax.ShapeDtypeStruct` of every parameter that `forward` expects for this configuration."""
    tensor = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype))
    return jax.tree.map(lambda record: tensor(record.shape), param_records(config))


def random_params(config: ModelConfig, dtype: str, seed: int, device: jax.Device | None = None) -> Params:
    """Random weights of the right shapes, made on the device leaf by leaf: for training and for benchmarks.

    Matrices are normal, norms are the identity, biases zero.
    """
    with jax.default_device(device):
        return make_params(config, seed, lambda record, key: record.init(key, record.shape, jnp.dtype(dtype)))


def make_params(config: ModelConfig, seed: int, make: Callable[[Tensor, Array], Array]) -> Params:
    """What `make` makes of each record and its own random key."""
    records, treedef = jax.tree.flatten(param_records(config))
    # The hardware generator: threefry would take minutes for billions of weights, and nothing depends on these numbers.
    key = jax.random.key(seed & 0xFFFFFFFF, impl="unsafe_rbg")
    if seed >> 32:  # jax would drop these bits of a seed, or refuse it
        key = jax.random.fold_in(key, jnp.uint32(seed >> 32))
    return jax.tree.unflatten(treedef, [make(record, jax.random.fold_in(key, i)) for i, record in enumerate(records)])


def stored_names(name: str, record: Tensor, renamed: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """What checkpoints of Hugging Face call the parts of the parameter `name`, with a family's own names of modules.

    "layers.3.attention_out.weight" -> ("layers.3.self_attn.o_proj.weight",); what stands before it differs by file.
    """
    layer = "".join(re.findall(r"^layers\.\d+\.", name))
    suffix = "bias" if name.endswith(".bias") else "weight"
    own = renamed or {}
    return tuple(f"{layer}{own.get(part.module, part.module)}.{suffix}" for part in record.parts)
