"""Decode attention, one query token a sequence, at the speed of memory (Mosaic GPU, Hopper).

Decoding is bound by reading keys and values once. Each program (CTA) therefore keeps a ring of `stages` tiles of keys
and values in flight: memory warps ask the TMA unit for page after page and never compute; a compute warpgroup takes the
tiles as they arrive. Programs are persistent: each gets an equal share of all key tiles (`work_split.py`), and the
ring stays full from one row to the next.

* **Keys on M.** A warpgroup's matrix product needs 64 rows. The few query heads that share a KV head would leave most
  of them empty, so the operands are swapped: scores[keys, heads] = K Qᵀ, out[head_dim, heads] = Vᵀ P. Heads are the
  free dimension N, padded only to a multiple of 8.
* **Packs.** With fewer than 8 query heads a KV head, one program takes several KV heads in turn: each fills its own
  columns of one [.., N] tile. So queries and outputs need no padding in memory.
* **Running softmax** over tiles (Milakov and Gimelshein, arXiv 1805.02867): highest score so far, sum and output are
  rescaled when the highest grows. A row that lies whole in one share is divided by its sum and written; pieces of a cut
  one are written as they are and merged by `merge.py`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check_ids, check_options, check_pages, check_scales
from pallas_kernels.decode_kernel import Phase, attend
from pallas_kernels.decode_program import DecodeOptions
from pallas_kernels.decode_tile import DecodeTile, check_tile, choose_tile, columns_per_row, heads_per_pack
from pallas_kernels.merge import Pieces, merge_pieces
from pallas_kernels.mosaic import num_multiprocessors
from pallas_kernels.work_split import max_chunks, max_pieces, split_work

Array = jax.Array


@functools.partial(
    jax.jit, static_argnames=("scale", "soft_cap", "sliding_window", "batch_invariant", "tile", "num_programs")
)
def paged_decode(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_tables: Array,
    context_lens: Array,
    *,
    scale: float,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    k_scales: Array | None = None,
    v_scales: Array | None = None,
    batch_invariant: bool = False,
    tile: DecodeTile | None = None,
    num_programs: int | None = None,
) -> Array:
    """One query token a sequence: arguments and result as of `reference.paged_decode`.

    With `batch_invariant`, a row's bits depend on its own length, query and keys alone, not on the other rows.
    `tile` and `num_programs` are for tuning; by default they follow from the shapes and the device. ValueError for
    shapes and dtypes that the kernel does not run. Table entries behind a row's length must name pages of the pool;
    what these hold reaches no output.
    """
    check_pages(q, k_pages, v_pages, block_tables)
    check_ids("block_tables", block_tables, (q.shape[0], block_tables.shape[1]))
    check_ids("context_lens", context_lens, (q.shape[0],))
    check_options(soft_cap, sliding_window)
    scales = check_scales(k_pages, k_scales, v_scales)
    rows, heads, head_dim = q.shape
    kv_heads = k_pages.shape[2]
    group = heads // kv_heads
    pack = heads_per_pack(heads, kv_heads)
    num_packs = kv_heads // pack
    columns = columns_per_row(heads, kv_heads)
    tile = tile or choose_tile(columns, head_dim, k_pages.dtype.itemsize)
    check_tile(tile, columns, head_dim, k_pages.dtype.itemsize)
    num_programs = num_programs or tile.programs * num_multiprocessors()
    num_shares = max(2, num_programs // num_packs)

    computes_in = q.dtype if scales is None else jnp.float16  # the one dtype that fp8 converts to directly
    queries = pack_queries(q.astype(computes_in), num_packs, columns)
    page_size = k_pages.shape[1]
    block_tables = pad_tables(block_tables, tile, page_size)
    split = split_work(
        context_lens, num_shares=num_shares, tile_keys=tile.keys, page_keys=min(page_size, tile.keys),
        sliding_window=sliding_window, batch_invariant=batch_invariant,
    )  # fmt: skip
    longest = -(-block_tables.shape[1] * page_size // tile.keys)
    options = DecodeOptions(
        tile, group, columns, (max_pieces(rows, num_shares, longest, batch_invariant),), q.dtype,
        max_chunks(longest) if batch_invariant else None, scale, soft_cap, sliding_window,
    )  # fmt: skip
    phase = Phase(queries, block_tables, context_lens, split)
    (out,), (pieces,) = attend((phase,), k_pages, v_pages, scales, options)
    out = merge_pieces(out, Pieces(*pieces, split.starts, split.cuts), split.rows[1], options.pieces_per_row)
    return out[:, :, : pack * group].reshape(q.shape)


def pack_queries(q: Array, num_packs: int, columns: int) -> Array:
    """q [B, H, D] -> [B, packs, columns, D], padded with zeros where a pack's heads do not fill its columns."""
    packed = q.reshape(q.shape[0], num_packs, -1, q.shape[2])
    return jnp.pad(packed, ((0, 0), (0, 0), (0, columns - packed.shape[2]), (0, 0)))


def pad_tables(block_tables: Array, tile: DecodeTile, page_size: int) -> Array:
    """With NULL_PAGE behind the end, for the last tile of a row: it may begin at the table's last page."""
    return jnp.pad(block_tables, ((0, 0), (0, max(1, tile.keys // page_size) - 1)))
