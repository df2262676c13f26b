"""Merges partial results of rows: of a row that was cut between programs, and of a prefix that rows share.

Each piece is a softmax over its own keys, not yet divided by its denominator. The merged one is the sum of the pieces,
each scaled from its own highest score to the highest of all (log-sum-exp), over the sum of the denominators.
"""

from __future__ import annotations

import functools
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
    """Partial results, and the split that says whose they are."""

    outs: Array  # f32[K / R, slots, D, columns]
    sums: Array  # f32[K / R, slots, 2, columns] highest score (base 2) and denominator
    starts: Array  # i32[rows + 1] as in WorkSplit
    cuts: Array  # i32[shares + 1]


def merge_pieces(out: Array, own: Pieces, slots_per_row: int | None = None) -> Array:
    """Complete `out` [B, K / R, N, D] in place: rows with more than one piece are written, the others are there."""
    out_ref = jax.new_ref(out)
    _merge(out_ref, out, own, None, None, slots_per_row)
    return jax.freeze(out_ref)


def merge_with_prefixes(own: Pieces, shared: Pieces, parts: Array, out: jax.ShapeDtypeStruct) -> Array:
    """Rows' own pieces with those of the prefixes that they share -> `out` [B, K / R, N, D].

    The columns of `shared` are those of M rows side by side. parts i32[levels, B] says where row b is:
    group * M + member, or -1.
    """
    return _merge(None, out, own, shared, parts, None)


def _merge(
    out_ref: Any, out: Any, own: Pieces, shared: Pieces | None, parts: Array | None, slots_per_row: int | None
) -> Any:
    num_rows, packs, columns, head_dim = out.shape
    swizzle = swizzle_bytes(head_dim, out.dtype)
    offsets = jnp.array(row_tiles(head_dim), jnp.int32)  # a program merges 64 rows of the output's head_dim

    def kernel(*refs):
        out_ref, refs = (refs[0], refs[1:]) if shared is None else (refs[-2], (*refs[:-2], refs[-1]))
        own_refs, offsets_ref, *refs = Pieces(*refs[:4]), *refs[4:]
        *refs, out_tile = refs
        row, pack = lax.axis_index("row"), lax.axis_index("pack")
        rows = pl.ds(pl.multiple_of(offsets_ref[lax.axis_index("part")], swizzle // out.dtype.itemsize), 64)
        load = functools.partial(plgpu.load, optimized=False)

        def add_pieces(state, pieces, first_slot, count, column):
            window = pl.ds(column, columns)

            def add(i, state):
                highest, total, merged = state
                loaded = []
                for j in range(TOGETHER):
                    slot = first_slot + lax.min(i * TOGETHER + j, count - 1)
                    weightless = jnp.where(i * TOGETHER + j < count, f32(0), f32(MASKED))
                    piece_highest = load(pieces.sums.at[pack, slot, 0, window], layout=COLUMN) + weightless
                    piece_total = load(pieces.sums.at[pack, slot, 1, window], layout=COLUMN)
                    piece = load(pieces.outs.at[pack, slot, rows, window], layout=TILE)
                    loaded.append((piece_highest, piece_total, piece))
                for piece_highest, piece_total, piece in loaded:
                    new_highest = jnp.maximum(highest, piece_highest)
                    old, new = jnp.exp2(highest - new_highest), jnp.exp2(piece_highest - new_highest)
                    kept = merged * lax.broadcast_in_dim(old, merged.shape, [1])
                    merged = kept + piece * lax.broadcast_in_dim(new, piece.shape, [1])
                    total = total * old + piece_total * new
                    highest = new_highest
                return highest, total, merged

            return lax.fori_loop(i32(0), lax.div(count + (TOGETHER - 1), i32(TOGETHER)), add, state)

        def merge(first_slot, count):
            state = (
                plgpu.layout_cast(jnp.full((columns,), MASKED, f32), COLUMN),
                plgpu.layout_cast(jnp.zeros((columns,), f32), COLUMN),
                plgpu.layout_cast(jnp.zeros((64, columns), f32), TILE),
            )
            state = add_pieces(state, own_refs, first_slot, count, 0)
            if shared is not None:
                shared_refs, parts_ref = Pieces(*refs[:4]), refs[4]
                members = shared.outs.shape[3] // columns
                for level in range(parts_ref.shape[0]):
                    part = parts_ref[level, row]
                    group, member = lax.div(lax.max(part, i32(0)), i32(members)), lax.rem(part, i32(members))
                    slot, pieces = pieces_of(group, shared_refs.starts, shared_refs.cuts, None)
                    column = pl.multiple_of(lax.max(member, i32(0)) * columns, 8)
                    state = add_pieces(state, shared_refs, slot, jnp.where(part >= 0, pieces, i32(0)), column)
            _, total, merged = state
            inverse = jnp.where(total > 0, 1.0 / total, 0.0)
            out_tile.T[...] = (merged * lax.broadcast_in_dim(inverse, merged.shape, [1])).astype(out_tile.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_tile, out_ref.at[row, pack, :, rows])
            plgpu.wait_smem_to_gmem(0)

        first_slot, count = pieces_of(row, own_refs.starts, own_refs.cuts, slots_per_row)
        if shared is None:
            pl.when(count > 1)(lambda: merge(first_slot, count))
        else:
            merge(first_slot, count)

    call = plgpu.kernel(
        kernel,
        out_type=() if shared is None else jax.ShapeDtypeStruct(out.shape, out.dtype),
        scratch_types=[plgpu.SMEM((columns, 64), out.dtype, transforms=swizzled(swizzle, out.dtype))],
        grid=(num_rows, packs, offsets.size),
        grid_names=("row", "pack", "part"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="merge_pieces",
    )
    if shared is None:
        return call(out_ref, *own, offsets)
    return call(*own, offsets, *shared, parts)
