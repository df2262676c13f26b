"""Paged attention in plain XLA: the oracle that every kernel is tested against, and the path for CPUs and older GPUs.

Both functions walk over the context in tiles with a running softmax (Milakov and Gimelshein, arXiv 1805.02867), so
memory stays bounded for any context, and the number of tiles follows the longest context, not the block table's width.
A row's result does not depend, to the bit, on the other rows. Softmax and accumulation are in float32.

Pages that no table names are never read; table entries behind a sequence's length, and in front of its first query's
window, may name any page (they are gathered, masked, and their contents, NaN included, never reach an output).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.checks import FP8

Array = jax.Array

#: Query tokens of one row, and context positions, that an iteration of `paged_prefill` looks at.
QUERY_TILE = 32
PREFILL_CONTEXT_TILE = 128
#: Context positions that an iteration of `paged_decode` looks at, in every row. Few on a CPU: above 32 MB of
#: temporaries malloc returns them to the system after each step, and the next one pays for fresh pages (at 256 rows
#: that was most of the time).
DECODE_CONTEXT_TILE = {"cpu": 32, "gpu": 256}


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
) -> Array:
    """One query token a sequence.

    q [B, H, D], k_pages and v_pages [N, S, K, D], block_tables i32[B, P], context_lens i32[B] (the query's own position
    included; 0 for a padding row, whose output is 0) -> [B, H, D] in q's dtype. A query reads its `sliding_window` last
    positions. k_scales and v_scales f32[N or 1, K or 1] multiply what fp8 pages hold.
    """
    tile = DECODE_CONTEXT_TILE.get(jax.default_backend(), 128)
    out = _attend(
        q[:, None], context_lens[:, None] - 1, k_pages, v_pages, block_tables, context_lens,
        scale, soft_cap, sliding_window, tile, k_scales, v_scales,
    )  # fmt: skip
    return out[:, 0]


def paged_prefill(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_tables: Array,
    query_starts: Array,
    query_lens: Array,
    context_lens: Array,
    *,
    scale: float,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    k_scales: Array | None = None,
    v_scales: Array | None = None,
) -> Array:
    """Many query tokens a sequence, causal against all of the sequence's paged KV.

    q [T, H, D] packed: row b owns q[query_starts[b] : query_starts[b] + query_lens[b]], the last tokens of its
    context_lens[b] readable ones. -> [T, H, D]; tokens that no row owns get 0. Scales as in `paged_decode`.
    """
    tokens = q.shape[0]
    tile = min(QUERY_TILE, tokens)
    tiles_of_row = -(-query_lens // tile)
    ends = jnp.cumsum(tiles_of_row)

    def attend_tile(i, out):
        row = jnp.searchsorted(ends, i, side="right").astype(jnp.int32)
        offsets = (i - (ends[row] - tiles_of_row[row])) * tile + jnp.arange(tile)
        is_query = offsets < query_lens[row]
        index = jnp.where(is_query, query_starts[row] + offsets, tokens)
        positions = context_lens[row] - query_lens[row] + offsets
        part = _attend(
            q.at[index].get(mode="fill", fill_value=0)[None], positions[None], k_pages, v_pages,
            block_tables[row][None], context_lens[row][None], scale, soft_cap, sliding_window, PREFILL_CONTEXT_TILE,
            k_scales, v_scales,
        )  # fmt: skip
        return out.at[index].set(part[0], mode="drop")

    return jax.lax.fori_loop(0, ends[-1], attend_tile, jnp.zeros_like(q))


def cascade_decode(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_tables: Array,
    context_lens: Array,
    groups: Any,
    *,
    scale: float,
    soft_cap: float | None = None,
) -> Array:
    """`paged_decode` in which a row reads a run of its groups (cascade.py) through the first member's table."""
    page_size, members = k_pages.shape[1], groups.members.shape[1]
    pages = jnp.arange(block_tables.shape[1])
    read = jnp.where(pages * page_size >= groups.own_starts[:, None], block_tables, 0)
    for parts in groups.parts:
        group = jnp.maximum(parts, 0) // members
        first, count = groups.first_pages[group][:, None], groups.num_pages[group][:, None]
        in_run = (parts >= 0)[:, None] & (pages >= first) & (pages < first + count)
        read = jnp.where(in_run, block_tables[jnp.maximum(groups.members[group, 0], 0)], read)
    return paged_decode(q, k_pages, v_pages, read, context_lens, scale=scale, soft_cap=soft_cap)


def _attend(
    q: Array,
    positions: Array,
    k_pages: Array,
    v_pages: Array,
    block_tables: Array,
    context_lens: Array,
    scale: float,
    soft_cap: float | None,
    sliding_window: int | None,
    context_tile: int,
    k_scales: Array | None = None,
    v_scales: Array | None = None,
) -> Array:
    """q [B, Q, H, D] at positions i32[B, Q] of their sequences -> [B, Q, H, D]."""
    rows, queries, heads, head_dim = q.shape
    _, page_size, kv_heads, _ = k_pages.shape
    pages_per_tile = max(1, context_tile // page_size)
    tile = pages_per_tile * page_size
    width = -(-block_tables.shape[1] // pages_per_tile) * pages_per_tile
    block_tables = jnp.pad(block_tables, ((0, 0), (0, width - block_tables.shape[1])))
    grouped = q.reshape(rows, queries, kv_heads, heads // kv_heads, head_dim).astype(jnp.float32)

    def read_tile(pages: Array, scales: Array | None, table: Array) -> Array:
        values = _pages_at(pages, table).astype(jnp.float32)
        if scales is not None:
            values = values * (scales[table] if scales.shape[0] > 1 else scales)[..., None, :, None]
        return values.reshape(rows, tile, kv_heads, head_dim)

    def attend_tile(i, state):
        highest, total, out = state
        table = jax.lax.dynamic_slice_in_dim(block_tables, i * pages_per_tile, pages_per_tile, axis=1)
        keys_at = i * tile + jnp.arange(tile)
        exists = keys_at < context_lens[:, None]  # [B, tile]
        readable = exists[:, None] & (keys_at <= positions[:, :, None])  # [B, Q, tile]
        if sliding_window is not None:
            readable &= keys_at > positions[:, :, None] - sliding_window
            exists &= keys_at > positions[:, :1] - sliding_window  # before, the table may name any page
        k, v = read_tile(k_pages, k_scales, table), read_tile(v_pages, v_scales, table)
        v = jnp.where(exists[:, :, None, None], v, 0.0)  # a masked weight of 0 times NaN would be NaN
        scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, k, precision="highest") * scale
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        scores = jnp.where(readable[:, None, None], scores, -jnp.inf)
        new_highest = jnp.maximum(highest, scores.max(-1))
        base = jnp.where(jnp.isfinite(new_highest), new_highest, 0.0)  # a row that has read nothing yet
        weights = jnp.exp(scores - base[..., None])
        decay = jnp.exp(highest - base)
        total = total * decay + weights.sum(-1)
        out = out * decay[..., None] + jnp.einsum("bkgqs,bskd->bkgqd", weights, v, precision="highest")
        return new_highest, total, out

    shape = (rows, kv_heads, heads // kv_heads, queries)
    state = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, head_dim)))
    num_tiles = -(-jnp.max(context_lens, initial=0) // tile)
    _, total, out = jax.lax.fori_loop(0, num_tiles, attend_tile, state)
    out = out / jnp.where(total == 0, 1.0, total)[..., None]
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


def _pages_at(pages: Array, table: Array) -> Array:
    """The pages that a table names. Of fp8 their bits are looked up: XLA on a CPU converts all pages of a pool to 16
    bits before it looks up 8-bit floats."""
    if pages.dtype.name != FP8:
        return pages[table]
    bits = jax.lax.bitcast_convert_type(pages, jnp.uint8)[table]
    return jax.lax.bitcast_convert_type(bits, pages.dtype)


def copy_pages(pools: tuple[Array, ...], src: Array, dst: Array) -> tuple[Array, ...]:
    """Pools [N, S, K, D]; page src[i] of each goes to dst[i], ids i32[C]. In place where the caller donates the pools.

    A page may be copied several times, and a page onto itself; otherwise no source may be a destination, nor a
    destination be named twice.
    """
    return tuple(pool.at[dst].set(pool[src]) for pool in pools)
