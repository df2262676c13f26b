"""Prefill attention, many query tokens a sequence, at the speed of the tensor cores (Mosaic GPU, Hopper).

After FlashAttention-3 (Shah et al., arXiv 2407.08608). A program (CTA) holds a *query tile*, 128 tokens of one head.
It walks over the tiles of keys and values that these tokens may read, and keeps for every token its highest score so
far, the sum of its weights and the weighted sum of values. Three warpgroups (128 threads each) share the work:

* **Two compute warpgroups** with 64 query tokens each, the rows of one matrix instruction (wgmma). Both products of a
  step are issued together: the scores of this key tile, and the values of the *previous* one. While the second runs,
  the softmax of the first is computed; what remains is covered by the products of the other warpgroup.
* **A memory warpgroup** that never computes. One warp asks the TMA unit for queries, one for keys and one for values,
  page after page, into places in shared memory that take turns. Barriers tell `ready` tiles from `free` places; at
  first every place is free.

Programs are persistent: they take query tile after query tile, so that tiles keep coming in while outputs are written.
The work is handed out with the longest contexts first, back and forth over the programs, which evens out their shares.

Query tiles divide the packed tokens, not the sequences: a tile may hold tokens of several rows of the batch. It attends
to the row of its first token, then to the next row, and so on; tokens of other rows are masked, which leaves their
maximum, sum and output exactly as they were. Only key tiles at the causal diagonal, at the start of a window, and of
query tiles that several rows share need a mask at all. Key tiles are visited backwards, from the diagonal on.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check_ids, check_options, check_pages, check_scales
from pallas_kernels.mosaic import num_multiprocessors
from pallas_kernels.prefill_kernel import attend
from pallas_kernels.prefill_program import PrefillOptions
from pallas_kernels.prefill_tile import PrefillTile, check_tile, choose_tile
from pallas_kernels.query_tiles import QUERIES, order_tiles

Array = jax.Array


@functools.partial(
    jax.jit, static_argnames=("scale", "soft_cap", "sliding_window", "tile", "num_programs", "interpret")
)
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
    tile: PrefillTile | None = None,
    num_programs: int | None = None,
    interpret: Any = None,
) -> Array:
    """Many query tokens a sequence: arguments and result as of `reference.paged_prefill`.

    Scales of fp8 pages belong to heads, f32[1, K or 1], not to pages. A row's bits depend on its own queries and keys
    alone, not on the other rows, nor on its place among them. `tile` and `num_programs` are for tuning; by default they
    follow from the shapes and the device. With `interpret` (`plgpu.InterpretGPUParams`) the kernel runs on a CPU,
    slowly. ValueError for shapes and dtypes that the kernel does not run. Table entries behind a row's context must
    name pages of the pool; what these hold reaches no output.
    """
    check_pages(q, k_pages, v_pages, block_tables)
    scales = check_scales(k_pages, k_scales, v_scales)
    for name, array in (("query_starts", query_starts), ("query_lens", query_lens), ("context_lens", context_lens)):
        check_ids(name, array, (block_tables.shape[0],))
    check_options(soft_cap, sliding_window)
    if not scale > 0:
        raise ValueError(f"scale={scale}; the scale of scores is positive")
    tokens, heads, head_dim = q.shape
    dtype, itemsize = q.dtype, k_pages.dtype.itemsize
    tile = tile or choose_tile(head_dim, itemsize)
    check_tile(tile, itemsize)
    if scales is not None:
        _check_by_head(scales)
        q = _scaled(q, scales[0], jnp.float16)  # the one dtype that fp8 converts to directly

    q = jnp.pad(q, ((0, -tokens % QUERIES), (0, 0), (0, 0)))
    pages_per_tile = max(1, tile.keys // k_pages.shape[1])
    block_tables = jnp.pad(block_tables, ((0, 0), (0, -block_tables.shape[1] % pages_per_tile)))
    num_tiles = q.shape[0] // QUERIES
    order = order_tiles(
        query_starts, query_lens, context_lens, num_tiles=num_tiles, keys=tile.keys, sliding_window=sliding_window
    )
    num_programs = min(num_programs or num_multiprocessors(), num_tiles * heads)
    options = PrefillOptions(scale, soft_cap, sliding_window, num_programs, interpret)
    rows = jnp.stack([query_starts, query_lens, context_lens], axis=1)
    out = attend(q, k_pages, v_pages, block_tables, rows, order, tile, options)[:tokens]
    return out if scales is None else _scaled(out, scales[1], dtype)


def _check_by_head(scales: tuple[Array, Array]) -> None:
    for name, scale in zip(("k_scales", "v_scales"), scales, strict=True):
        if scale.shape[0] != 1:
            raise ValueError(
                f"{name} is float32{list(scale.shape)}, a scale for each page; this kernel runs scales of heads, "
                f"float32[1, {scale.shape[1]}]"
            )


def _scaled(x: Array, scale: Array, dtype: Any) -> Array:
    """x [T, H, D] with the heads of each KV head multiplied by its scale f32[1, K or 1]."""
    by_head = jnp.repeat(scale[0], x.shape[1] // scale.shape[1])
    return (x.astype(jnp.float32) * by_head[:, None]).astype(dtype)
