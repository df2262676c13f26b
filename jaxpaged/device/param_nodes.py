"""The parameters of a model as typed nodes of a pytree: `params.layers[3].qkv.weight`.

A node's fields stand in the order of their names. It is the order of the leaves, by which random weights are numbered,
and in which a compiled step takes them.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import struct

Array = jax.Array


@struct.dataclass(kw_only=True)
class Norm:
    """Of the last axis.

    Attributes:
        bias: [E]; None in RMS norm.
        weight: [E], or [D] where heads are normalised.
    """

    bias: Array | None = None
    weight: Array


@struct.dataclass(kw_only=True)
class Linear:
    """A matrix as it is multiplied: x @ weight + bias.

    Attributes:
        bias: [out]; None where there is none.
        weight: [in, out].
    """

    bias: Array | None = None
    weight: Array


@struct.dataclass(kw_only=True)
class Layer:
    """Attention and feed-forward. Q, K and V are one matrix, and so are the two halves of a gated MLP: fewer and larger
    matrix products a step. F is the intermediate size.

    Attributes:
        attention_norm: [E].
        attention_out: [H * D, E].
        key_norm, query_norm: [D]; None unless heads are normalised.
        mlp_in: [E, 2F], gate and up side by side, or [E, F] without a gate.
        mlp_norm: [E].
        mlp_out: [F, E].
        post_attention_norm, post_mlp_norm: [E]; None unless blocks are normalised behind, too.
        qkv: [E, (H + 2K) * D].
    """

    attention_norm: Norm
    attention_out: Linear
    key_norm: Norm | None = None
    mlp_in: Linear
    mlp_norm: Norm
    mlp_out: Linear
    post_attention_norm: Norm | None = None
    post_mlp_norm: Norm | None = None
    qkv: Linear
    query_norm: Norm | None = None


@struct.dataclass(kw_only=True)
class Params:
    """A model. The same nodes also hold shapes (`param_shapes`) and records (`param_records`) in place of arrays.

    Attributes:
        embedding: [V, E'], where E' is `embedding_dim`, usually the hidden size E.
        embedding_in: [E', E]; None unless E' differs from E.
        embedding_out: [E, E']; None unless E' differs from E.
        final_norm: [E]; None in models without one.
        layers: a node a layer.
        lm_head: [E', V]; None if it is the embedding.
        position_embedding: [positions, E]; None unless positions are learned.
    """

    embedding: Array
    embedding_in: Array | None = None
    embedding_out: Array | None = None
    final_norm: Norm | None = None
    layers: tuple[Layer, ...]
    lm_head: Linear | None = None
    position_embedding: Array | None = None


def by_name(params: Params) -> dict[str, Any]:
    """Names like "layers.0.qkv.weight" -> leaves, in their order."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
