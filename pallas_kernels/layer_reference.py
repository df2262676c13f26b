"""What stands between the matrix products of a layer and its attention, in plain XLA: the oracle of `add_norm.py` and
`write_heads.py`, and what runs where they cannot.

Everything is computed in float32, whatever the dtype, as the reference implementations of model families do.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class HeadNorms(NamedTuple):
    """RMS norms of single heads of queries and keys, before they are rotated (Qwen 3, Gemma 3)."""

    query: Array  # [D]
    key: Array  # [D]
    eps: float
    offset: float


class Rotation(NamedTuple):
    """Of each token by its position."""

    cos: Array  # f32[T, D / 2]
    sin: Array


def rms_norm(x: Array, weight: Array, eps: float, offset: float) -> Array:
    """x [..., E] over its root mean square, times (weight [E] + offset)."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    return (y * (weight.astype(jnp.float32) + offset)).astype(x.dtype)


def add_norm(x: Array, h: Array, weight: Array, *, eps: float, offset: float) -> tuple[Array, Array]:
    """x, h [T, E], weight [E] -> x + h, rounded to their dtype, and the RMS norm of that."""
    x = x + h
    return x, rms_norm(x, weight, eps, offset)


def rotate(x: Array, rotation: Rotation) -> Array:
    """In the half-split form of Hugging Face checkpoints: x [T, heads, D] -> [T, heads, D]."""
    cos, sin = rotation.cos[:, None], rotation.sin[:, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def split_heads(
    projected: Array, kv_heads: int, rotation: Rotation | None, norms: HeadNorms | None
) -> tuple[Array, Array, Array]:
    """[T, H + 2 K, D] -> queries [T, H, D], keys and values [T, K, D]; queries and keys normed, then rotated."""
    heads = projected.shape[1] - 2 * kv_heads
    q, k, v = jnp.split(projected, (heads, heads + kv_heads), axis=1)
    if norms is not None:
        q = rms_norm(q, norms.query, norms.eps, norms.offset)
        k = rms_norm(k, norms.key, norms.eps, norms.offset)
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    return q, k, v


def write_heads(
    projected: Array, rotation: Rotation, norms: HeadNorms | None, slots: Array, k_pages: Array, v_pages: Array
) -> tuple[Array, Array, Array]:
    """Heads [T, H + 2 K, D] of T tokens -> queries [T, H, D], and the pages with their keys and values.

    slots i32[T] say where these go: page * S + place in the page; pages [N, S, K, D] of the heads' dtype, in place
    where the caller donates them. Slots are unique, but for tokens that nobody reads.
    """
    page_size, kv_heads = k_pages.shape[1:3]
    q, k, v = split_heads(projected, kv_heads, rotation, norms)
    place = slots // page_size, slots % page_size
    k_pages, v_pages = (
        pages.at[place].set(new, unique_indices=True, mode="promise_in_bounds")
        for pages, new in ((k_pages, k), (v_pages, v))
    )
    return q, k_pages, v_pages
