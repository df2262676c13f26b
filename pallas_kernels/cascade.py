"""Decode attention that reads a prefix once for all rows that share it (Mosaic GPU, Hopper).

Parallel samples and beams name the same pages at the beginning of their block tables. Attention over a set of keys
can be put together from attention over its parts (log-sum-exp), so the keys are read in two phases of one kernel: runs
of pages that several rows share, with the queries of those rows side by side on the free dimension of the matrix
product; then what each row has for itself. `merge.py` joins them. The idea is known as cascade or bifurcated attention
(FlashInfer, arXiv 2501.01005; Athiwaratkun et al., arXiv 2403.08845).

Which rows share what is planned on the host, from the block tables.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.cascade_groups import CascadeGroups
from pallas_kernels.checks import FP8, check_ids, check_options, check_pages
from pallas_kernels.decode_kernel import Phase, attend
from pallas_kernels.decode_program import DecodeOptions
from pallas_kernels.decode_tile import choose_shared_tile, columns_per_row, heads_per_pack
from pallas_kernels.merge import Pieces, merge_with_prefixes
from pallas_kernels.mosaic import num_multiprocessors
from pallas_kernels.paged_decode import pack_queries, pad_tables
from pallas_kernels.work_split import max_pieces, split_work

Array = jax.Array


@functools.partial(jax.jit, static_argnames=("scale", "soft_cap", "num_programs"))
def cascade_decode(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_tables: Array,
    context_lens: Array,
    groups: CascadeGroups,
    *,
    scale: float,
    soft_cap: float | None = None,
    num_programs: int | None = None,
) -> Array:
    """As `paged_decode`, with the same result up to rounding, but each group's run of pages is read once.

    At most 8 members a group; sliding windows and fp8 pages have no groups (`paged_decode` runs them).
    """
    check_pages(q, k_pages, v_pages, block_tables)
    rows, heads, head_dim = q.shape
    num_groups, members = groups.members.shape
    check_ids("block_tables", block_tables, (rows, block_tables.shape[1]))
    check_ids("context_lens", context_lens, (rows,))
    check_ids("groups.members", groups.members, (num_groups, members))
    check_ids("groups.first_pages", groups.first_pages, (num_groups,))
    check_ids("groups.num_pages", groups.num_pages, (num_groups,))
    check_ids("groups.own_starts", groups.own_starts, (rows,))
    check_ids("groups.parts", groups.parts, (groups.parts.shape[0], rows))
    check_options(soft_cap, None)
    if k_pages.dtype.name == FP8:
        raise ValueError(f"pages are {FP8}; cascades read pages of q's dtype only: use paged_decode")
    page_size, kv_heads = k_pages.shape[1:3]
    pack = heads_per_pack(heads, kv_heads)
    num_packs, group = kv_heads // pack, heads // kv_heads
    columns = columns_per_row(heads, kv_heads)
    tile = choose_shared_tile(columns, members * columns, head_dim, k_pages.dtype.itemsize)
    num_programs = num_programs or tile.programs * num_multiprocessors()
    num_shares = max(2, num_programs // num_packs)

    split = functools.partial(
        split_work, num_shares=num_shares, tile_keys=tile.keys, page_keys=min(page_size, tile.keys)
    )
    queries = pack_queries(q, num_packs, columns)
    block_tables = pad_tables(block_tables, tile, page_size)
    starts = groups.first_pages * page_size
    ends = jnp.where(groups.num_pages > 0, starts + groups.num_pages * page_size, 0)
    # The queries of a group's members side by side: [V, M, packs, N, D] -> [V, packs, M * N, D].
    stacked = queries[jnp.maximum(groups.members, 0)].transpose(0, 2, 1, 3, 4)
    stacked = stacked.reshape(num_groups, num_packs, members * columns, head_dim)
    shared_tables = block_tables[jnp.maximum(groups.members[:, 0], 0)]
    phases = (
        Phase(stacked, shared_tables, ends, split(ends, own_starts=starts, skips_empty=True)),
        Phase(queries, block_tables, context_lens, split(context_lens, own_starts=groups.own_starts)),
    )
    room = tuple(max_pieces(phase.ends.shape[0], num_shares, 0, batch_invariant=False) for phase in phases)
    options = DecodeOptions(tile, group, columns, room, None, None, scale, soft_cap, None)
    _, pieces = attend(phases, k_pages, v_pages, None, options)
    shared, own = (
        Pieces(*of_phase, phase.split.starts, phase.split.cuts) for of_phase, phase in zip(pieces, phases, strict=True)
    )
    out = jax.ShapeDtypeStruct(queries.shape, q.dtype)
    merged = merge_with_prefixes(own, shared, groups.parts, out)
    return merged[:, :, : pack * group].reshape(q.shape)
