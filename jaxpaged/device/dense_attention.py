"""Attention over dense rows [rows, max_len, K, D]: cuDNN's where it runs, else XLA's. What paging is compared with.

cuDNN reads each row up to its length. It wants queries as rows, too, so they are put where their keys are: in decoding
in the order of the cache's rows, so that no key is moved; in prefill at their positions in rows of their own, a few at
a time, which makes its plain causal mask right for a prompt's later chunks, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jaxpaged.config import AttentionOptions
from jaxpaged.step_io import PrefillInputs

Array = jax.Array

#: Of jax.nn.dot_product_attention. "xla" computes the same, to test what surrounds it where there is no cuDNN.
Implementation = Literal["cudnn", "xla"]
#: Sequences of one cuDNN call in prefill: bounds the memory for their queries, which are padded to `max_len`.
PREFILL_ROWS = 8


def decode_rows(
    q: Array,
    k: Array,
    v: Array,
    rows: Array,
    context_lens: Array,
    options: AttentionOptions,
    implementation: Implementation = "cudnn",
) -> Array:
    """q [B, H, D] of the cache's rows i32[B] (-1: padding), of which context_lens i32[B] tokens count -> [B, H, D].

    What a padding row gives is undefined.
    """
    in_order = jnp.where(rows < 0, k.shape[0], rows)
    # A row that nobody reads has one token: cuDNN gives no promise for none.
    lens = jnp.ones(k.shape[0], jnp.int32).at[in_order].set(context_lens, mode="drop")
    queries = jnp.zeros((k.shape[0], 1, *q.shape[1:]), q.dtype).at[in_order, 0].set(q, mode="drop")
    out = jax.nn.dot_product_attention(
        queries, k, v, scale=options.scale, key_value_seq_lengths=lens, implementation=implementation
    )
    return out[jnp.maximum(rows, 0), 0]


def prefill_rows(
    q: Array,
    read: Callable[[Array], tuple[Array, Array]],
    max_len: int,
    rows: Array,
    inputs: PrefillInputs,
    options: AttentionOptions,
    implementation: Implementation = "cudnn",
) -> Array:
    """q [T, H, D], packed -> [T, H, D]; tokens that no row owns get 0.

    `read` takes some of the cache's `rows` i32[B] and gives their k and v, [*, max_len, K, D].
    """
    size = min(PREFILL_ROWS, len(rows))
    num_rows = jnp.sum(inputs.query_lens > 0)  # rows without queries are padding, behind all others

    def attend_rows(i: Array, out: Array) -> Array:
        some = i * size + jnp.arange(size)
        some, is_row = jnp.minimum(some, len(rows) - 1), some < num_rows
        first = (inputs.context_lens - inputs.query_lens)[some, None]
        offsets = jnp.arange(max_len) - first  # of positions, among the row's queries
        is_query = is_row[:, None] & (offsets >= 0) & (offsets < inputs.query_lens[some, None])
        index = jnp.where(is_query, inputs.query_starts[some, None] + offsets, len(q))
        k, v = read(jnp.maximum(rows[some], 0))
        lens = jnp.maximum(inputs.context_lens[some], 1)
        part = jax.nn.dot_product_attention(
            q.at[index].get(mode="fill", fill_value=0), k, v, scale=options.scale, is_causal=True,
            query_seq_lengths=lens, key_value_seq_lengths=lens, implementation=implementation,
        )  # fmt: skip
        return out.at[index].set(part, mode="drop")

    return jax.lax.fori_loop(0, -(-num_rows // size), attend_rows, jnp.zeros_like(q))


def decode_xla(q: Array, k: Array, v: Array, rows: Array, context_lens: Array, options: AttentionOptions) -> Array:
    """As `decode_rows`, with all that a model's attention may do, in float32 where weights and values meet."""
    num_rows, max_len, kv_heads, head_dim = k.shape
    back = jnp.maximum(rows, 0)
    if len(rows) < num_rows:  # few of many: they are copied out, else all are read in place
        k, v, out_rows = k[back], v[back], jnp.arange(len(rows))
    else:
        in_order = jnp.where(rows < 0, num_rows, rows)
        context_lens = jnp.zeros(num_rows, jnp.int32).at[in_order].set(context_lens, mode="drop")
        q, out_rows = jnp.zeros((num_rows, *q.shape[1:]), q.dtype).at[in_order].set(q, mode="drop"), back
    keys_at = jnp.arange(max_len)
    readable = keys_at < context_lens[:, None]
    v = jnp.where(readable[:, :, None, None], v, 0)  # a masked weight of 0 times NaN would be NaN
    if options.sliding_window is not None:
        readable &= keys_at >= context_lens[:, None] - options.sliding_window
    grouped = q.reshape(len(q), kv_heads, -1, head_dim)
    scores = jnp.einsum("bkgd,bskd->bkgs", grouped, k, precision="highest", preferred_element_type=jnp.float32)
    scores = scores * options.scale
    if options.soft_cap is not None:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    weights = jax.nn.softmax(jnp.where(readable[:, None, None], scores, -1e30), axis=-1)
    out = jnp.einsum("bkgs,bskd->bkgd", weights, v.astype(jnp.float32), precision="highest")
    return out.reshape(q.shape)[out_rows].astype(q.dtype)
