"""Merges partial results of rows: of a row that was cut between programs, and of a prefix that rows share.

Each piece is a softmax over its own keys, not yet divided by its denominator. The merged one is the sum of the pieces,
each scaled from its own highest score to the highest of all (log-sum-exp), over the sum of the denominators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import COLUMN, MASKED, TILE, row_tiles, swizzle_bytes, swizzled
from pallas_kernels.work_split import pieces_of

Array = jax.Array
i32, f32 = jnp.int32, jnp.float32

#: Pieces that are loaded together: their latencies overlap.
TOGETHER = 8


class Pieces(NamedTuple):
    """Partial results, and the split that says whose they are: arrays, or in a kernel references to them."""

    outs: Any  # f32[K / R, pieces, D, columns]
    sums: Any  # f32[K / R, pieces, 2, columns] highest score (base 2) and denominator
    starts: Any  # i32[rows + 1] as in WorkSplit
    cuts: Any  # i32[shares + 1]


class Merged(NamedTuple):
    """What has been merged so far, in registers."""

    highest: Any  # f32[N]
    total: Any  # f32[N]
    out: Any  # f32[64, N] rows of the output's head_dim


def merge_pieces(out: Array, own: Pieces, last_rows: Array, pieces_per_row: int | None = None) -> Array:
    """Complete `out` [B, K / R, N, D] in place: rows with more than one piece are written, the others are there.

    last_rows i32[shares] is the last row of each share (`WorkSplit.rows`): of an equal split only these can be cut, so
    a program looks at one of them and not at one of all rows where those are more.
    """
    by_share = pieces_per_row is None and len(last_rows) < out.shape[0]

    def kernel(out_ref, outs_ref, sums_ref, starts_ref, cuts_ref, last_rows_ref, offsets_ref, out_tile):
        place, pack, part = _place(out, offsets_ref)
        pieces = Pieces(outs_ref, sums_ref, starts_ref, cuts_ref)
        row = last_rows_ref[place] if by_share else place
        is_mine = True
        if by_share:  # a row that is in several shares is the first one's
            row = lax.max(row, i32(0))
            begin = starts_ref[row]
            is_mine = (begin >= cuts_ref[place]) & (begin < cuts_ref[place + 1])
        first, count = pieces_of(row, starts_ref, cuts_ref, pieces_per_row)

        @pl.when(is_mine & (count > 1))
        def _():
            merged = _add_pieces(_nothing(out.shape[2]), pieces, pack, part, first, count, column=0)
            _write(merged, out_tile, out_ref.at[row, pack, :, part])

    out_ref = jax.new_ref(out)
    num_places = len(last_rows) if by_share else out.shape[0]
    _launch(kernel, out, (), num_places)(out_ref, *own, last_rows, _offsets(out))
    return jax.freeze(out_ref)


def merge_with_prefixes(own: Pieces, shared: Pieces, parts: Array, out: jax.ShapeDtypeStruct) -> Array:
    """Rows' own pieces with those of the prefixes that they share -> `out` [B, K / R, N, D].

    The columns of `shared` are those of M rows side by side. parts i32[levels, B] says where row b is:
    group * M + member, or -1.
    """
    columns = out.shape[2]
    members = shared.outs.shape[3] // columns

    def kernel(*refs):
        own_refs, shared_refs, (parts_ref, offsets_ref, out_ref, out_tile) = (
            Pieces(*refs[:4]),
            Pieces(*refs[4:8]),
            refs[8:],
        )
        row, pack, part = _place(out, offsets_ref)
        first, count = pieces_of(row, own_refs.starts, own_refs.cuts, None)
        merged = _add_pieces(_nothing(columns), own_refs, pack, part, first, count, column=0)
        for level in range(parts.shape[0]):
            place = parts_ref[level, row]
            group, member = lax.div(lax.max(place, i32(0)), i32(members)), lax.rem(lax.max(place, i32(0)), i32(members))
            first, count = pieces_of(group, shared_refs.starts, shared_refs.cuts, None)
            count = jnp.where(place >= 0, count, i32(0))
            column = pl.multiple_of(member * columns, 8)
            merged = _add_pieces(merged, shared_refs, pack, part, first, count, column=column)
        _write(merged, out_tile, out_ref.at[row, pack, :, part])

    launch = _launch(kernel, out, jax.ShapeDtypeStruct(out.shape, out.dtype), out.shape[0])
    return launch(*own, *shared, parts, _offsets(out))


def _launch(kernel: Callable[..., None], out: Any, out_type: Any, num_places: int) -> Callable[..., Any]:
    """One program for each place of a row, pack of KV heads, and 64 rows of the output's head_dim."""
    _, packs, columns, head_dim = out.shape
    transforms = swizzled(swizzle_bytes(head_dim, out.dtype), out.dtype)
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=[plgpu.SMEM((columns, 64), out.dtype, transforms=transforms)],
        grid=(num_places, packs, len(row_tiles(head_dim))),
        grid_names=("place", "pack", "part"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="merge_pieces",
    )


def _offsets(out: Any) -> Array:
    return jnp.array(row_tiles(out.shape[3]), jnp.int32)


def _place(out: Any, offsets_ref: Any) -> tuple[Any, Any, pl.Slice]:
    """The program's place, pack, and rows of the output's head_dim."""
    tile_columns = swizzle_bytes(out.shape[3], out.dtype) // out.dtype.itemsize
    offset = pl.multiple_of(offsets_ref[lax.axis_index("part")], tile_columns)
    return lax.axis_index("place"), lax.axis_index("pack"), pl.ds(offset, 64)


def _nothing(columns: int) -> Merged:
    return Merged(
        plgpu.layout_cast(jnp.full((columns,), MASKED, f32), COLUMN),
        plgpu.layout_cast(jnp.zeros((columns,), f32), COLUMN),
        plgpu.layout_cast(jnp.zeros((64, columns), f32), TILE),
    )


def _add_pieces(merged: Merged, pieces: Pieces, pack: Any, part: Any, first: Any, count: Any, column: Any) -> Merged:
    """Add `count` pieces from number `first` on, of which the columns from `column` on belong to the row."""
    window = pl.ds(column, merged.highest.shape[0])
    load = functools.partial(plgpu.load, optimized=False)

    def add(i, merged):
        loaded = []
        for j in range(TOGETHER):
            piece = first + lax.min(i * TOGETHER + j, count - 1)
            weightless = jnp.where(i * TOGETHER + j < count, f32(0), f32(MASKED))
            highest = load(pieces.sums.at[pack, piece, 0, window], layout=COLUMN) + weightless
            total = load(pieces.sums.at[pack, piece, 1, window], layout=COLUMN)
            loaded.append(Merged(highest, total, load(pieces.outs.at[pack, piece, part, window], layout=TILE)))
        return functools.reduce(_merge, loaded, merged)

    return lax.fori_loop(i32(0), lax.div(count + (TOGETHER - 1), i32(TOGETHER)), add, merged)


def _merge(a: Merged, b: Merged) -> Merged:
    highest = jnp.maximum(a.highest, b.highest)
    scale_a, scale_b = jnp.exp2(a.highest - highest), jnp.exp2(b.highest - highest)
    kept = a.out * lax.broadcast_in_dim(scale_a, a.out.shape, [1])
    out = kept + b.out * lax.broadcast_in_dim(scale_b, b.out.shape, [1])
    return Merged(highest, a.total * scale_a + b.total * scale_b, out)


def _write(merged: Merged, out_tile: Any, out_ref: Any) -> None:
    inverse = jnp.where(merged.total > 0, 1.0 / merged.total, 0.0)
    scaled = merged.out * lax.broadcast_in_dim(inverse, merged.out.shape, [1])
    out_tile.T[...] = scaled.astype(out_tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_tile, out_ref)
    plgpu.wait_smem_to_gmem(0)
