"""What is asked of a whole row of logits, in as few passes over it as can be: its largest, its sum, a draw.

A row is looked at in chunks of C tokens. One pass gives the largest value of each chunk, one the sum of its
exponentials; the rest is arithmetic on V / C numbers and on the one chunk that matters. Whoever asks several of these
questions about the same logits asks for the same passes, which XLA makes once.

A draw takes two steps: a chunk by its share of the whole, then a token by its share of the chunk. Each is a Gumbel-max
draw, so it needs V / C + C random numbers and not V, which at 256 rows of 128k tokens took longer than five passes.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array

#: Tokens of a chunk: about the square root of large vocabularies.
CHUNK = 256


def argmax(values: Array) -> Array:
    """f32[R, V] -> i32[R]: the lowest of the likeliest tokens of each row; of a row with NaN the first that has one."""
    chunks = _in_chunks(values)
    chunk = jnp.argmax(chunks.max(-1), axis=-1)
    return (chunk * CHUNK + jnp.argmax(_at(chunks, chunk), axis=-1)).astype(jnp.int32)


def logsumexp(values: Array) -> Array:
    """f32[R, V] -> f32[R], finite unless a row has NaN or +inf, or is all -inf."""
    return jax.nn.logsumexp(_log_sums(_in_chunks(values), lambda values: values), axis=-1)


def num_random(vocab_size: int) -> int:
    """Random numbers of a draw."""
    return -(-vocab_size // CHUNK) + CHUNK


def draw(values: Array, scale: Callable[[Array], Array], noise: Array) -> Array:
    """A token i32[R] of each row, from the softmax of scale(values).

    `scale` takes values [R, ...] element by element, of each row in its way, and never puts a smaller one above a
    larger one. noise f32[R, num_random(V)] is Gumbel noise.
    """
    chunks = _in_chunks(values)
    num_chunks = chunks.shape[1]
    chunk = jnp.argmax(_log_sums(chunks, scale) + noise[:, :num_chunks], axis=-1)
    token = jnp.argmax(scale(_at(chunks, chunk)) + noise[:, num_chunks:], axis=-1)
    return (chunk * CHUNK + token).astype(jnp.int32)


def _log_sums(chunks: Array, scale: Callable[[Array], Array]) -> Array:
    """log of the sum of exp(scale(values)) of each chunk: f32[R, V / C]."""
    highest = scale(chunks.max(-1))  # as large as the largest scaled value
    highest = jnp.where(jnp.isfinite(highest), highest, 0.0)
    return highest + jnp.log(jnp.exp(scale(chunks) - highest[..., None]).sum(-1))


def _in_chunks(values: Array) -> Array:
    """[R, V] -> [R, V / C, C], padded with -inf."""
    rows, vocab_size = values.shape
    padded = jnp.pad(values, ((0, 0), (0, -vocab_size % CHUNK)), constant_values=-jnp.inf)
    return padded.reshape(rows, -1, CHUNK)


def _at(chunks: Array, chunk: Array) -> Array:
    """[R, V / C, C], i32[R] -> [R, C]."""
    return jnp.take_along_axis(chunks, chunk[:, None, None], axis=1)[:, 0]
