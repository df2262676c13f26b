"""The kernel behind `paged_prefill`: what lies where, and who does what.

What they do is in `prefill_load.py` and `prefill_compute.py`.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import swizzle_bytes, swizzled
from pallas_kernels.prefill_compute import attend_items
from pallas_kernels.prefill_load import load_pages, load_queries
from pallas_kernels.prefill_program import HALF, Places, PrefillOptions, PrefillProgram, PrefillSizes, f32
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
    options: PrefillOptions,
) -> Array:
    """q [T, H, D] with T a multiple of QUERIES, rows i32[B, 3] of start, queries and context -> [T, H, D].

    Pages of another dtype than q's are converted to it tile by tile.
    """
    sizes = _sizes(q, k_pages, order, tile)
    flat_scratch, scratch_tree = jax.tree.flatten(
        _shared_memory(q, k_pages, tile, sizes, options), lambda node: not isinstance(node, tuple | list)
    )

    def kernel(q_ref, k_ref, v_ref, tables_ref, rows_ref, order_ref, out_ref, *scratch):
        loaded, converted, met, interpreted_outs = scratch_tree.unflatten(scratch)
        axes, rows_of = (lax.axis_index("program"), lax.axis_index("warpgroup")), (tables_ref, rows_ref, order_ref)
        places = _places_of(loaded, converted, tile)
        program = PrefillProgram._make([options, sizes, *axes, *rows_of, *places, met, interpreted_outs])
        _run(program, q_ref, k_ref, v_ref, out_ref)

    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=flat_scratch,
        grid=(options.num_programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        interpret=options.interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_prefill",
    )
    return call(q, k_pages, v_pages, block_tables, rows, order)


def _places_of(loaded: Any, converted: Any, tile: PrefillTile) -> tuple[Places, ...]:
    """For queries, for keys and values as they are multiplied, and for both as they are loaded."""
    queries, *pages = (Places._make([*parts, count]) for parts, count in zip(loaded, _loaded_places(tile), strict=True))
    if not converted:
        return queries, *pages, *pages
    counts = (tile.key_places, tile.value_places)
    multiplied = [Places(tiles, None, None, count) for tiles, count in zip(converted, counts, strict=True)]
    return queries, *multiplied, *pages


def _run(program: PrefillProgram, q_ref, k_ref, v_ref, out_ref):
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
            pl.when(warp == 1)(lambda: load_pages(program, program.key_pages, k_ref))
            pl.when(warp == 2)(lambda: load_pages(program, program.value_pages, v_ref))


def _sizes(q: Array, k_pages: Array, order: Array, tile: PrefillTile) -> PrefillSizes:
    heads, head_dim = q.shape[1:]
    page_size, kv_heads = k_pages.shape[1:3]
    page_keys = min(page_size, tile.keys)
    convert_columns = None
    if k_pages.dtype != q.dtype:  # as many as a wgmma layout and the registers take
        convert_columns = min(swizzle_bytes(head_dim, k_pages.dtype), 64)
    return PrefillSizes(
        heads, kv_heads, tile.keys, page_size, page_keys, tile.keys // page_keys, order.shape[0] * heads,
        convert_columns,
    )  # fmt: skip


def _loaded_places(tile: PrefillTile) -> tuple[int, int, int]:
    """For tiles of queries, keys and values as they arrive."""
    return tile.query_places, tile.page_places or tile.key_places, tile.page_places or tile.value_places


def _shared_memory(
    q: Array, k_pages: Array, tile: PrefillTile, sizes: PrefillSizes, options: PrefillOptions
) -> tuple[Any, ...]:
    """Queries, keys and values as they arrive, each with its barriers; tiles that are converted; and the rest of a
    `PrefillProgram`."""
    head_dim = q.shape[2]
    swizzle = sizes.convert_columns or swizzle_bytes(head_dim, k_pages.dtype)
    of_queries = swizzled(swizzle_bytes(head_dim, q.dtype), q.dtype)

    def tiles(*shape, dtype=q.dtype, transforms: Any = of_queries):
        return plgpu.SMEM((*shape, head_dim), dtype, transforms=transforms)

    def of_pages(places):
        return tiles(places, sizes.keys, dtype=k_pages.dtype, transforms=swizzled(swizzle, k_pages.dtype))

    def with_barriers(some, places, arrivals):
        ready, free = (plgpu.Barrier(num_arrivals=count, num_barriers=places) for count in (arrivals, 2))
        return some, ready, free

    query_places, *page_places = _loaded_places(tile)
    loaded = [
        with_barriers(tiles(query_places, 2, HALF), query_places, 2),
        *(with_barriers(of_pages(places), places, sizes.copies) for places in page_places),
    ]
    converted = [tiles(places, sizes.keys) for places in (tile.key_places, tile.value_places)]
    interpreted_outs = [] if options.interpret is None else [plgpu.SMEM((2, HALF, head_dim), f32)]
    return (
        loaded, [] if sizes.convert_columns is None else converted, plgpu.Barrier(num_arrivals=2), interpreted_outs
    )  # fmt: skip
