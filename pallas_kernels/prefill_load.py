"""The memory warps of the prefill kernel: they ask the TMA unit for tiles in order, and never compute."""

from __future__ import annotations

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.prefill_program import HALF, Places, PrefillProgram, drain, for_each_item, i32, read_segment
from pallas_kernels.query_tiles import QUERIES


def load_queries(program: PrefillProgram, q_ref):
    """One warp: the queries of all items in order, each as soon as there is a free place."""
    places = program.queries

    def load_item(tile_index, first_row, last_row, head, count):
        del first_row, last_row
        place = lax.rem(count, i32(places.count))
        plgpu.barrier_wait(places.free.at[place])
        for half in range(2):
            tokens = pl.ds(tile_index * QUERIES + half * HALF, HALF)
            plgpu.copy_gmem_to_smem(q_ref.at[tokens, head], places.tiles.at[place, half], places.ready.at[place])
        return count + 1

    drain(places, for_each_item(program, load_item, i32(0)))


def load_pages(program: PrefillProgram, places: Places, pages_ref):
    """Another warp: the same for the keys of all items, or for their values."""
    heads, kv_heads = program.sizes.heads, program.sizes.kv_heads

    def load_item(tile_index, first_row, last_row, head, count):
        kv_head = lax.div(head, i32(heads // kv_heads))

        def load_row(row, count):
            segment = read_segment(program, tile_index, row, first_row)

            def load_tile(j, count):
                place = lax.rem(count, i32(places.count))
                _load_tile(program, places, place, pages_ref, kv_head, row, segment.end - 1 - j)
                return count + 1

            return lax.fori_loop(i32(0), segment.end - segment.begin, load_tile, count)

        return lax.fori_loop(first_row, last_row + 1, load_row, count)

    drain(places, for_each_item(program, load_item, i32(0)))


def _load_tile(program: PrefillProgram, places: Places, place, pages_ref, kv_head, row, i):
    """Ask for the pages of key tile i."""
    _, _, keys, page_size, page_keys, copies, *_ = program.sizes
    position = i * keys
    first_page = lax.div(position, i32(page_size))
    pages = [program.tables[row, first_page + n] for n in range(copies)]
    within = pl.ds(lax.rem(position, i32(page_size)) if page_size > keys else 0, page_keys)
    plgpu.barrier_wait(places.free.at[place])
    for n, page in enumerate(pages):
        plgpu.copy_gmem_to_smem(
            pages_ref.at[page, within, kv_head],
            places.tiles.at[place, pl.ds(n * page_keys, page_keys)],
            places.ready.at[place],
        )
