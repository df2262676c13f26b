"""The k likeliest tokens of each row, exactly as `lax.top_k` gives them, without ordering the vocabulary.

The row is cut into chunks of C tokens. Every one of the k best tokens is in one of the k best chunks, where chunks are
compared by their largest value, the lower chunk first among equals: a chunk behind k others has k tokens before any of
its own. So: one pass for the largest value of each chunk, the best k of V / C of those, and the best k of the k * C
tokens in them. The chunks are gathered in order of position, so equal values keep their order: the lowest token first.

The pass reads 4 V bytes a row, as an argmax does; the two selections are out of V / C + k * C values a row in sum,
which is least at C = sqrt(V / k).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

Array = jax.Array

#: Tokens of the smallest chunk: 128 bytes, what a GPU reads at once.
MIN_CHUNK = 32

#: Two selections must be out of that many times fewer values than one would be, or they are not worth the pass.
MIN_GAIN = 4


def top_candidates(log_probs: Array, k: int) -> tuple[Array, Array]:
    """The k largest of each row and their tokens: log_probs f32[R, V] -> values f32[R, k], token ids i32[R, k].

    Largest first, the lowest token first among equals, as `lax.top_k`; but -0.0 equals 0.0, where that puts it behind,
    and counts as 0.0. Of rows with NaN nothing is promised.
    """
    vocab_size = log_probs.shape[1]
    chunk = chunk_size(vocab_size, k)
    if chunk is None:
        values, tokens = jax.lax.top_k(_one_zero(log_probs), k)
        return values, tokens.astype(jnp.int32)
    with jax.named_scope("top_candidates"):
        # What pads the last chunk has no lower position than anything, so it is never among the best.
        padded = jnp.pad(log_probs, ((0, 0), (0, -vocab_size % chunk)), constant_values=-jnp.inf)
        maxima = padded.reshape(len(log_probs), -1, chunk).max(-1)  # [R, V / C]
        best = jnp.sort(
            jax.lax.top_k(_one_zero(maxima), k)[1].astype(jnp.int32), axis=-1
        )  # [R, k], in order of position
        kept = (best[:, :, None] * chunk + jnp.arange(chunk, dtype=jnp.int32)).reshape(len(log_probs), -1)  # [R, k * C]
        # Out of the unpadded rows: the pass above is then the only one that has to look at padding.
        values = jnp.take_along_axis(log_probs, kept, axis=1, mode="fill", fill_value=-jnp.inf)
        values, places = jax.lax.top_k(_one_zero(values), k)
        return values, jnp.take_along_axis(kept, places, axis=1)


def _one_zero(values: Array) -> Array:
    return jnp.where(values == 0, 0.0, values)


def chunk_size(vocab_size: int, k: int) -> int | None:
    """C for the two selections, a power of two; None where one selection out of the whole row is the better."""
    chunk = max(MIN_CHUNK, 1 << round(math.log2(math.sqrt(vocab_size / k))))
    num_chunks = -(-vocab_size // chunk)
    if k > num_chunks or MIN_GAIN * (num_chunks + k * chunk) > vocab_size:
        return None
    return chunk
