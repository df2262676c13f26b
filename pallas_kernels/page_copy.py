"""Copy-on-write in one launch: a step's list of pages, in the pools of all layers (Mosaic GPU, Hopper).

XLA copies pages with a gather and a scatter for every pool: twice the bytes, and two launches each for the keys and
for the values of every layer. Here each program copies a part of one page in a few of the pools: it asks for all of it
before it writes any, so one latency is paid, not several.
"""

from __future__ import annotations

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import reference
from pallas_kernels.checks import check_ids

Array = jax.Array

#: Pools of one program. Which ones is a chain of branches in the kernel, for pools are no array that has an index.
POOLS_TOGETHER = 4
#: Rows of a page's memory that a program copies at most, and their size: 128 threads with 16 bytes each, in 16 bits.
MAX_ROWS, ROW = 8, 1024


@jax.jit
def copy_pages(pools: tuple[Array, ...], src: Array, dst: Array) -> tuple[Array, ...]:
    """Pools [N, S, K, D], all of one shape and dtype; page src[i] of each goes to dst[i], ids i32[C].

    In place where the caller donates the pools. A page may be copied several times, and a page onto itself; otherwise
    no source may be a destination, nor a destination be named twice. Ids must name pages of the pools. Pages whose
    numbers are no multiple of 512 (one head of 80, say) are copied by XLA.
    """
    shape, dtype = pools[0].shape, pools[0].dtype
    for pool in pools:
        if pool.shape != shape or pool.dtype != dtype:
            raise ValueError(f"pools differ: {dtype}{list(shape)} and {pool.dtype}{list(pool.shape)}")
    check_ids("src", src, (src.size,))
    check_ids("dst", dst, src.shape)
    num_pages, size = shape[0], pools[0].size // shape[0]
    row = next((row for row in (ROW, ROW // 2) if size % row == 0), None)
    if row is None:
        return reference.copy_pages(pools, src, dst)
    rows = next(rows for rows in range(MAX_ROWS, 0, -1) if size // row % rows == 0)
    parts = size // row // rows

    def kernel(*refs):
        *pool_refs, src_ref, dst_ref = refs
        copy, part, group = (lax.axis_index(name) for name in ("copy", "part", "group"))
        source, target = src_ref[copy], dst_ref[copy]
        for first in range(0, len(pool_refs), POOLS_TOGETHER):
            together = pool_refs[first : first + POOLS_TOGETHER]

            @pl.when((group == first // POOLS_TOGETHER) & (source != target))  # what pads the list is no work
            def _(together=together):
                values = [ref[source, part] for ref in together]
                for ref, value in zip(together, values, strict=True):
                    ref[target, part] = value

    pool_refs = [jax.new_ref(pool.reshape(num_pages, parts, rows, row)) for pool in pools]
    plgpu.kernel(
        kernel,
        out_type=(),
        grid=(src.size, parts, -(-len(pools) // POOLS_TOGETHER)),
        grid_names=("copy", "part", "group"),
        compiler_params=plgpu.CompilerParams(),
        kernel_name="copy_pages",
    )(*pool_refs, src, dst)
    return tuple(jax.freeze(ref).reshape(shape) for ref in pool_refs)
