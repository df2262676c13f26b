"""Cuts the keys that a batch must read into equal shares, one for each program of a persistent kernel.

Laid end to end, the key tiles of all rows form a line, which is cut into equal shares (stream-K, Osama et al., arXiv
2301.03598; for attention: LeanAttention, arXiv 2405.10480). A share begins and ends wherever it does: inside a row,
whose partial results are then merged. So ragged batches and batches of one row fill the machine alike, and the scratch
memory depends on the number of rows and shares alone. Every pack of KV heads is cut at the same places: the programs of
one share read neighbouring memory at about the same time.

A row of length 0 counts as one tile, whose program writes the zeros.

Equal shares look at the whole batch, so the places where a row is cut, and with them its last bits, depend on its
neighbours. A batch-invariant split gives up equality for independence: rows are cut into chunks by a rule that sees the
row's own length alone, and shares begin and end between chunks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
i32 = jnp.int32

#: Batch-invariant chunks: so many key tiles at least, and so many chunks a row at most.
MIN_CHUNK_TILES = 8
MAX_CHUNKS = 32


class WorkSplit(NamedTuple):
    """Which tiles each share holds. Positions on the line count tiles."""

    firsts: Array  # i32[B] the token position where the row's first tile begins
    starts: Array  # i32[B + 1] place on the line where the row begins
    cuts: Array  # i32[shares + 1] place on the line where the share begins
    rows: Array  # i32[2, shares] first and last row of the share; last < first when it is empty


def split_work(
    context_lens: Array,
    *,
    num_shares: int,
    tile_keys: int,
    page_keys: int,
    own_starts: Array | None = None,
    sliding_window: int | None = None,
    batch_invariant: bool = False,
    skips_empty: bool = False,
) -> WorkSplit:
    """context_lens i32[B]; a row reads positions from `own_starts` i32[B] (None: 0), and from its window, on.

    `page_keys` positions come with one copy: tiles begin at multiples of it. With `skips_empty`, rows of length 0 stand
    behind all others, and nothing is written for them.
    """
    num_rows = context_lens.shape[0]
    firsts = jnp.zeros_like(context_lens) if own_starts is None else own_starts
    if sliding_window is not None:
        firsts = jnp.maximum(firsts, context_lens - sliding_window)
    firsts = firsts // page_keys * page_keys
    tiles = jnp.maximum(-(-(context_lens - firsts) // tile_keys), 0 if skips_empty else 1)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(tiles, dtype=jnp.int32)])
    total = starts[-1]
    cuts = jnp.minimum(jnp.arange(num_shares + 1, dtype=jnp.int32) * -(-total // num_shares), total)
    rows = jnp.sum(starts[1:] <= cuts[:, None], axis=1, dtype=jnp.int32)  # B for a cut behind the last row
    into_row = cuts - starts[rows]
    if batch_invariant:
        into_row = into_row - into_row % chunk_tiles(tiles[jnp.minimum(rows, num_rows - 1)])
        cuts = starts[rows] + into_row
    last_rows = rows[1:] - (into_row[1:] == 0).astype(jnp.int32)
    last_rows = jnp.minimum(last_rows, jnp.sum(tiles > 0) - 1)
    last_rows = jnp.where(cuts[1:] > cuts[:-1], last_rows, rows[:-1] - 1)
    return WorkSplit(firsts, starts, cuts, jnp.stack([rows[:-1], last_rows]))


def max_pieces(num_rows: int, num_shares: int, longest: int, batch_invariant: bool) -> int:
    """So many pieces `num_rows` rows of at most `longest` tiles can have, numbered as `pieces_of` does."""
    return num_rows * max_chunks(longest) if batch_invariant else num_rows + num_shares


def pieces_of(row: Any, starts: Any, cuts: Any, pieces_per_row: int | None) -> tuple[Any, Any]:
    """The number of the row's first piece, and how many it has, one after the other; in kernels, over references.

    Along the line every piece begins with a new row, a new share or both, so row + share numbers the pieces of an equal
    split. A batch-invariant one, with its `pieces_per_row`, numbers each row's chunks.
    """
    begin, end = starts[row], starts[row + 1]
    if pieces_per_row is not None:
        chunk = chunk_tiles(end - begin)
        return row * pieces_per_row, lax.div(end - begin + chunk - 1, chunk)
    share = jnp.maximum(cuts[1], 1)  # all shares are as long as the first, but for the last ones
    first_share = lax.div(begin, share)
    return row + first_share, lax.div(end - 1, share) - first_share + 1


def chunk_tiles(tiles: Any) -> Any:
    """Tiles of one batch-invariant chunk of a row with so many tiles."""
    return jnp.maximum(i32(MIN_CHUNK_TILES), (tiles + i32(MAX_CHUNKS - 1)) // i32(MAX_CHUNKS))


def max_chunks(tiles: int) -> int:
    """Chunks that a row of at most so many tiles can have."""
    return max(1, min(MAX_CHUNKS, -(-tiles // MIN_CHUNK_TILES)))
