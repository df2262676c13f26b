"""From the projection of a step's tokens to what attention reads, in one launch (Mosaic GPU, Hopper).

Queries and keys are normed and rotated, and keys and values go to their places in the page pool. One program takes one
token: TMA brings the two halves of its heads side by side, so that a rotation is arithmetic on two tiles, and takes
away queries, keys and values as they lie in memory. XLA makes four kernels of it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import layer_reference
from pallas_kernels.layer_reference import HeadNorms, Rotation
from pallas_kernels.mosaic import COLUMN, TILE

Array = jax.Array
f32 = jnp.float32

#: Heads of a tile, as many as a warpgroup's layout of a matrix has rows.
TILE_HEADS = 64
#: Heads that one copy brings at most, and rows of the tiles in which a matrix lies in shared memory.
MAX_COPIED, TILE_ROWS = 256, 8
#: Bytes of shared memory that a program may take, so that several share a multiprocessor.
MAX_BYTES = 100_000


class Sizes(NamedTuple):
    heads: int
    kv_heads: int
    half: int  # D / 2
    page_size: int

    @property
    def rotated(self) -> int:
        """Heads of queries and keys."""
        return self.heads + self.kv_heads

    @property
    def tiles(self) -> int:
        return -(-self.rotated // TILE_HEADS)


class Scratch(NamedTuple):
    """Shared memory of a program."""

    first: Any  # [tiles * 64, D / 2] first halves of queries and keys
    second: Any
    out: Any  # [tiles * 64, D] rotated
    values: Any  # [K, D]
    arrived: Any  # opens when all copies have


def write_heads(
    projected: Array, rotation: Rotation, norms: HeadNorms | None, slots: Array, k_pages: Array, v_pages: Array
) -> tuple[Array, Array, Array]:
    """Arguments and results as of `layer_reference.write_heads`, which does it for sizes that this kernel does not."""
    _, all_heads, head_dim = projected.shape
    page_size, kv_heads = k_pages.shape[1:3]
    sizes = Sizes(all_heads - 2 * kv_heads, kv_heads, head_dim // 2, page_size)
    if not _fits(sizes, projected.dtype.itemsize):
        return layer_reference.write_heads(projected, rotation, norms, slots, k_pages, v_pages)
    weights, options = ((), None) if norms is None else ((norms.query, norms.key), (norms.eps, norms.offset))
    return _launch(projected, rotation, weights, slots, k_pages, v_pages, sizes=sizes, norm_options=options)


@functools.partial(jax.jit, static_argnames=("sizes", "norm_options"))  # compiled once for all layers
def _launch(
    projected: Array, rotation: Rotation, weights: tuple[Array, ...], slots: Array, k_pages: Array, v_pages: Array, *,
    sizes: Sizes, norm_options: tuple[float, float] | None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    def kernel(*refs):
        heads_ref, cos_ref, sin_ref, slots_ref, *weight_refs = refs[: 4 + len(weights)]
        k_ref, v_ref, q_ref, *scratch = refs[4 + len(weights) :]
        scratch = Scratch(*scratch)
        token = lax.axis_index("token")
        slot = slots_ref[token]
        place = lax.div(slot, jnp.int32(sizes.page_size)), lax.rem(slot, jnp.int32(sizes.page_size))
        _load(heads_ref.at[token], scratch, sizes)
        turn = [_spread(ref.at[token], sizes.half) for ref in (cos_ref, sin_ref)]
        plgpu.barrier_wait(scratch.arrived)
        plgpu.copy_smem_to_gmem(scratch.values, v_ref.at[place])
        for tile in range(sizes.tiles):
            x, y = _normed(tile, scratch, sizes, weight_refs, norm_options)
            _rotate(x, y, turn, scratch.out.at[pl.ds(tile * TILE_HEADS, TILE_HEADS)], sizes.half)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch.out.at[pl.ds(0, sizes.heads)], q_ref.at[token])
        plgpu.copy_smem_to_gmem(scratch.out.at[pl.ds(sizes.heads, sizes.kv_heads)], k_ref.at[place])
        plgpu.wait_smem_to_gmem(0)

    k_ref, v_ref = jax.new_ref(k_pages), jax.new_ref(v_pages)
    q = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((len(projected), sizes.heads, projected.shape[2]), projected.dtype),
        scratch_types=list(_shared_memory(sizes, projected.dtype)),
        grid=(len(projected),),
        grid_names=("token",),
        compiler_params=plgpu.CompilerParams(),
        kernel_name="write_heads",
    )(projected, *rotation, slots, *weights, k_ref, v_ref)
    return q, jax.freeze(k_ref), jax.freeze(v_ref)


def _fits(sizes: Sizes, itemsize: int) -> bool:
    row = 2 * sizes.half * itemsize
    return (
        sizes.half % 8 == 0
        and sizes.rotated <= MAX_COPIED
        and sizes.heads % TILE_ROWS == sizes.kv_heads % TILE_ROWS == 0
        and (2 * sizes.tiles * TILE_HEADS + sizes.kv_heads) * row <= MAX_BYTES
    )


def _shared_memory(sizes: Sizes, dtype: jnp.dtype) -> Scratch:
    rows, head_dim = sizes.tiles * TILE_HEADS, 2 * sizes.half
    half = plgpu.SMEM((rows, sizes.half), dtype)
    values = plgpu.SMEM((sizes.kv_heads, head_dim), dtype)
    return Scratch(half, half, plgpu.SMEM((rows, head_dim), dtype), values, plgpu.Barrier(num_arrivals=3))


def _load(heads_ref, scratch: Scratch, sizes: Sizes):
    rows = pl.ds(0, sizes.rotated)
    for start, tiles in ((0, scratch.first), (sizes.half, scratch.second)):
        plgpu.copy_gmem_to_smem(heads_ref.at[rows, pl.ds(start, sizes.half)], tiles.at[rows], scratch.arrived)
    plgpu.copy_gmem_to_smem(heads_ref.at[pl.ds(sizes.rotated, sizes.kv_heads)], scratch.values, scratch.arrived)


def _spread(ref, half: int):
    """A row of D / 2 numbers over the heads of a tile."""
    row = plgpu.load(ref, layout=COLUMN, optimized=False).astype(f32)
    return lax.broadcast_in_dim(row, (TILE_HEADS, half), [1])


def _normed(tile: int, scratch: Scratch, sizes: Sizes, weight_refs, options: tuple[float, float] | None):
    """The two halves of the tile's heads, f32[64, D / 2] each."""
    rows, dtype = pl.ds(tile * TILE_HEADS, TILE_HEADS), scratch.first.dtype
    halves = [plgpu.load(ref.at[rows], layout=TILE, optimized=False).astype(f32) for ref in scratch[:2]]
    if options is None:
        return halves
    (x, y), (eps, offset) = halves, options
    squares = (x * x + y * y).sum(axis=1) * (0.5 / sizes.half)
    scale = lax.broadcast_in_dim(lax.rsqrt(squares + eps), x.shape, [0])
    head = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=TILE) + tile * TILE_HEADS
    normed = []
    for i, part in enumerate(halves):
        window = pl.ds(i * sizes.half, sizes.half)
        query, key = (_spread(ref.at[window], sizes.half) for ref in weight_refs)
        weight = jnp.where(head < sizes.heads, query, key) + offset
        normed.append((part * scale * weight).astype(dtype).astype(f32))
    return normed


def _rotate(x, y, turn, out, half: int):
    cos, sin = turn
    out[:, pl.ds(0, half)] = (x * cos - y * sin).astype(out.dtype)
    out[:, pl.ds(half, half)] = (y * cos + x * sin).astype(out.dtype)
