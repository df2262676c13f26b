"""Which keys a tile of packed query tokens reads: the bookkeeping of the prefill kernel, in scalars.

The tokens of all rows of a batch lie packed one after the other, and a query tile is the tokens [i * QUERIES,
(i + 1) * QUERIES) of them, whatever rows these belong to. What it reads of one row is a *segment*.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
i32 = jnp.int32

#: Tokens of a query tile.
QUERIES = 128


class Segment(NamedTuple):
    """What one query tile reads of one row: int32 scalars."""

    first: Any  # the row's tokens in the tile are [first, last) of the packed tokens
    last: Any
    shift: Any  # what to add to a token's packed place to have its position in the sequence
    context: Any  # keys of the row
    begin: Any  # the key tiles that it reads are [begin, end); those in [inner_begin, inner_end) need no mask
    inner_begin: Any
    inner_end: Any
    end: Any


def segment_of(
    tile_index: Any, start: Any, length: Any, context: Any, *, at_least: Any, keys: int, sliding_window: int | None
) -> Segment:
    """The segment of a row whose tokens are the packed ones [start, start + length), the last of `context` positions.

    It has `at_least` that many key tiles (0 or 1) also where the row has no token in the query tile; all masked then.
    Runs inside of kernels, which know few operations.
    """
    tile_start = tile_index * QUERIES
    first, last = lax.max(start, tile_start), lax.min(start + length, tile_start + QUERIES)
    shift = context - length - start
    end = jnp.where(first < last, lax.div(last + shift + (keys - 1), i32(keys)), at_least)
    begin = inner_begin = i32(0)
    if sliding_window is not None:
        begin = lax.div(lax.max(first + shift - (sliding_window - 1), i32(0)), i32(keys))
        begin = jnp.where(first < last, begin, i32(0))
        inner_begin = lax.div(lax.max(last + shift - sliding_window, i32(0)) + (keys - 1), i32(keys))
    inner_end = lax.max(lax.min(lax.div(first + shift + 1, i32(keys)), end), begin)
    inner_begin = lax.min(lax.max(inner_begin, begin), inner_end)
    inner_end = jnp.where(last - first == QUERIES, inner_end, inner_begin)  # other rows' tokens must be masked
    return Segment(first, last, shift, context, begin, inner_begin, inner_end, end)


def order_tiles(
    starts: Array, lens: Array, contexts: Array, *, num_tiles: int, keys: int, sliding_window: int | None
) -> Array:
    """Query tiles, those with most key tiles first: i32[tiles, 3] of the tile, the first and the last of its rows.

    A tile whose tokens no row owns is given row 0.
    """
    start = jnp.arange(num_tiles, dtype=i32)[:, None] * QUERIES
    first, last = jnp.maximum(starts, start), jnp.minimum(starts + lens, start + QUERIES)  # [tiles, B]
    in_tile = first < last
    shift = contexts - lens - starts
    begin = 0 if sliding_window is None else jnp.maximum(first + shift - (sliding_window - 1), 0) // keys
    key_tiles = jnp.where(in_tile, -(-(last + shift) // keys) - begin, 0).sum(1)
    row = jnp.arange(starts.shape[0], dtype=i32)
    last_row = jnp.where(in_tile, row, 0).max(1)
    first_row = jnp.where(in_tile, row, last_row[:, None]).min(1)
    return jnp.stack([start[:, 0] // QUERIES, first_row, last_row], axis=1)[jnp.argsort(-key_tiles)]
