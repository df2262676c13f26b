"""The kernel behind `paged_prefill`: what lies where, and who does what.

What they do is in `prefill_load.py` and `prefill_compute.py`.
"""

from __future__ import annotations

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import swizzle_bytes, swizzled
from pallas_kernels.prefill_compute import attend_items
from pallas_kernels.prefill_load import load_pages, load_queries
from pallas_kernels.prefill_program import HALF, Options, Places, Program, Sizes, f32
from pallas_kernels.prefill_tile import PrefillTile

Array = jax.Array

#: Registers a thread of the compute and of the memory warpgroups: together, at most the 65,536 of a multiprocessor.
COMPUTE_REGISTERS, MEMORY_REGISTERS = 240, 24


def attend(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_tables: Array,
    rows: Array,
    order: Array,
    tile: PrefillTile,
    options: Options,
) -> Array:
    """q [T, H, D] with T a multiple of QUERIES, rows i32[B, 3] of start, queries and context -> [T, H, D]."""
    sizes = _sizes(q, k_pages, order, tile)

    def kernel(
        q_ref, k_ref, v_ref, tables_ref, rows_ref, order_ref, out_ref,
        q_tiles, k_tiles, v_tiles, q_ready, k_ready, v_ready, q_free, k_free, v_free, v_clean, *interpreted_outs,
    ):  # fmt: skip
        program = Program(
            options, sizes, warpgroup=lax.axis_index("warpgroup"), index=lax.axis_index("program"),
            tables=tables_ref, rows=rows_ref, order=order_ref,
            queries=Places(q_tiles, tile.query_places, q_ready, q_free),
            keys=Places(k_tiles, tile.key_places, k_ready, k_free),
            values=Places(v_tiles, tile.value_places, v_ready, v_free),
            v_clean=v_clean, interpreted_outs=interpreted_outs,
        )  # fmt: skip
        _run(program, q_ref, k_ref, v_ref, out_ref)

    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=_shared_memory(q, tile, sizes, options),
        grid=(options.num_programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        interpret=options.interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_prefill",
    )
    return call(q, k_pages, v_pages, block_tables, rows, order)


def _run(program: Program, q_ref, k_ref, v_ref, out_ref):
    """Who does what: two warpgroups compute, three warps of the last load."""

    @pl.when(program.warpgroup < 2)
    def _():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        attend_items(program, out_ref)

    @pl.when(program.warpgroup == 2)
    def _():
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 0)(lambda: load_queries(program, q_ref))
            pl.when(warp == 1)(lambda: load_pages(program, program.keys, k_ref))
            pl.when(warp == 2)(lambda: load_pages(program, program.values, v_ref))


def _sizes(q: Array, k_pages: Array, order: Array, tile: PrefillTile) -> Sizes:
    heads = q.shape[1]
    page_size, kv_heads = k_pages.shape[1:3]
    page_keys = min(page_size, tile.keys)
    return Sizes(heads, kv_heads, tile.keys, page_size, page_keys, tile.keys // page_keys, order.shape[0] * heads)


def _shared_memory(q: Array, tile: PrefillTile, sizes: Sizes, options: Options) -> list:
    head_dim = q.shape[2]
    transforms = swizzled(swizzle_bytes(head_dim, q.dtype), q.dtype)

    def tiles(places, *shape):
        return plgpu.SMEM((places, *shape, head_dim), q.dtype, transforms=transforms)

    all_places = (tile.query_places, tile.key_places, tile.value_places)
    scratch = [
        tiles(tile.query_places, 2, HALF),
        tiles(tile.key_places, sizes.keys),
        tiles(tile.value_places, sizes.keys),
        plgpu.Barrier(num_arrivals=2, num_barriers=tile.query_places),
        plgpu.Barrier(num_arrivals=sizes.copies, num_barriers=tile.key_places),
        plgpu.Barrier(num_arrivals=sizes.copies, num_barriers=tile.value_places),
        *[plgpu.Barrier(num_arrivals=2, num_barriers=places) for places in all_places],
        plgpu.Barrier(num_arrivals=2),
    ]
    return scratch if options.interpret is None else [*scratch, plgpu.SMEM((2, HALF, head_dim), f32)]
