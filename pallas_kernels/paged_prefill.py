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
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.checks import check_ids, check_options, check_pages
from pallas_kernels.mosaic import (
    ACCUMULATOR,
    MASKED,
    ROW,
    TILE,
    capped_scores,
    num_multiprocessors,
    swizzle_bytes,
    swizzled,
)
from pallas_kernels.query_tiles import QUERIES, order_tiles, segment_of

Array = jax.Array
i32, f32 = jnp.int32, jnp.float32

#: Query tokens of one compute warpgroup.
HALF = QUERIES // 2
#: Registers a thread of the compute and of the memory warpgroups: together, at most the 65,536 of a multiprocessor.
COMPUTE_REGISTERS, MEMORY_REGISTERS = 240, 24
#: Shared memory of a program, less what barriers need.
SHARED_MEMORY = 226 * 1024
#: Lower than any score, much higher than MASKED times any scale: the weight of a masked key, exp2(MASKED * scale -
#: highest), is 0 even for a token that has seen no key of its own.
LOWEST = -1e20


@dataclass(frozen=True)
class PrefillTile:
    """How a program works: keys of one tile, and for how many tiles of each kind shared memory has a place."""

    keys: int = 128
    query_places: int = 2
    key_places: int = 2
    value_places: int = 3

    def __post_init__(self):
        if self.keys % 64 or not 0 < self.keys <= 256:
            raise ValueError(f"keys={self.keys}; a tile holds a multiple of 64 keys, at most 256")
        if self.query_places < 1 or self.key_places < 2 or self.value_places < 2:
            raise ValueError(f"{self}: at least 1 place for queries, 2 for keys and 2 for values")


def choose_tile(head_dim: int) -> PrefillTile:
    """The tile for this head size: as many places as shared memory has (more than 4 gain nothing)."""
    keys, query_places = (128, 2) if head_dim <= 128 else (64, 1)  # by registers, then by shared memory
    token_bytes = 2 * head_dim
    places = (SHARED_MEMORY - query_places * QUERIES * token_bytes) // (keys * token_bytes)
    # Values are needed a step later than keys, so they wait longer.
    return PrefillTile(keys, query_places, min(places // 2, 4), min(places - places // 2, 4))


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
    tile: PrefillTile | None = None,
    num_programs: int | None = None,
    interpret: Any = None,
) -> Array:
    """Many query tokens a sequence: arguments and result as of `reference.paged_prefill`.

    A row's bits depend on its own queries and keys alone, not on the other rows, nor on its place among them. `tile`
    and `num_programs` are for tuning; by default they follow from the shapes and the device. With `interpret`
    (`plgpu.InterpretGPUParams`) the kernel runs on a CPU, slowly. ValueError for shapes and dtypes that the kernel does
    not run. Table entries behind a row's context must name pages of the pool; what these hold reaches no output.
    """
    rows = block_tables.shape[0]
    check_pages(q, k_pages, v_pages, block_tables)
    if k_pages.dtype != q.dtype:
        raise ValueError(f"pages are {k_pages.dtype} and q is {q.dtype}; this kernel runs pages of q's dtype")
    for name, array in (("query_starts", query_starts), ("query_lens", query_lens), ("context_lens", context_lens)):
        check_ids(name, array, (rows,))
    check_options(soft_cap, sliding_window)
    if not scale > 0:
        raise ValueError(f"scale={scale}; the scale of scores is positive")
    tokens, heads, head_dim = q.shape
    tile = tile or choose_tile(head_dim)

    q = jnp.pad(q, ((0, -tokens % QUERIES), (0, 0), (0, 0)))
    pages_per_tile = max(1, tile.keys // k_pages.shape[1])
    block_tables = jnp.pad(block_tables, ((0, 0), (0, -block_tables.shape[1] % pages_per_tile)))
    num_tiles = q.shape[0] // QUERIES
    order = order_tiles(
        query_starts, query_lens, context_lens, num_tiles=num_tiles, keys=tile.keys, sliding_window=sliding_window
    )
    out = _attend(
        q, k_pages, v_pages, block_tables, jnp.stack([query_starts, query_lens, context_lens], axis=1), order,
        scale=scale, soft_cap=soft_cap, sliding_window=sliding_window, tile=tile,
        num_programs=min(num_programs or num_multiprocessors(), num_tiles * heads), interpret=interpret,
    )  # fmt: skip
    return out[:tokens]


def _attend(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_tables: Array,
    rows: Array,
    order: Array,
    *,
    scale: float,
    soft_cap: float | None,
    sliding_window: int | None,
    tile: PrefillTile,
    num_programs: int,
    interpret: Any,
) -> Array:
    """q [T, H, D] with T a multiple of QUERIES, rows i32[B, 3] of start, queries and context -> [T, H, D]."""
    _, heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    keys, query_places, key_places, value_places = tile.keys, tile.query_places, tile.key_places, tile.value_places
    page_keys = min(page_size, keys)  # keys that one copy brings
    copies = keys // page_keys
    num_items = order.shape[0] * heads

    def kernel(
        q_ref, k_ref, v_ref, tables_ref, rows_ref, order_ref, out_ref,
        q_tiles, k_tiles, v_tiles,  # [places, 2, HALF, D], [places, keys, D] twice
        q_ready, k_ready, v_ready, q_free, k_free, v_free, v_clean, *interpreted_outs,
    ):  # fmt: skip
        warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")

        def for_each_item(visit, state):
            """state = visit(query tile, its first row, its last row, head, state) for what this program is to do."""

            def item_at(turn):
                return turn * num_programs + jnp.where(turn % 2 == 0, program, num_programs - 1 - program)

            def visit_turn(turn, state):
                item = item_at(turn)
                index = lax.div(item, i32(heads))
                return visit(
                    order_ref[index, 0], order_ref[index, 1], order_ref[index, 2], lax.rem(item, i32(heads)), state
                )

            turns = i32(num_items // num_programs)
            turns += jnp.where(item_at(turns) < num_items, i32(1), i32(0))
            return lax.fori_loop(i32(0), turns, visit_turn, state)

        def read_segment(tile_index, row, first_row):
            # A query tile's first segment has at least one key tile, so that there always is a first step.
            at_least = jnp.where(row == first_row, i32(1), i32(0))
            start, length, context = rows_ref[row, 0], rows_ref[row, 1], rows_ref[row, 2]
            return segment_of(
                tile_index, start, length, context, at_least=at_least, keys=keys, sliding_window=sliding_window
            )

        def drain(free, places, count):
            """Every phase of a barrier must be waited for: when all is loaded, until all is free."""
            for n in range(places):
                plgpu.barrier_wait(free.at[lax.rem(count + n, i32(places))])

        def load_queries():
            """A memory warp: ask for the queries of all items in order, each as soon as there is a free place."""

            def load_item(tile_index, first_row, last_row, head, count):
                del first_row, last_row
                place = lax.rem(count, i32(query_places))
                plgpu.barrier_wait(q_free.at[place])
                for half in range(2):
                    tokens = pl.ds(tile_index * QUERIES + half * HALF, HALF)
                    plgpu.copy_gmem_to_smem(q_ref.at[tokens, head], q_tiles.at[place, half], q_ready.at[place])
                return count + 1

            drain(q_free, query_places, for_each_item(load_item, i32(0)))

        def load_pages(pages_ref, tiles, ready, free, places):
            """A memory warp: the same for the keys of all items, or for their values."""

            def load_item(tile_index, first_row, last_row, head, count):
                kv_head = lax.div(head, i32(heads // kv_heads))

                def load_row(row, count):
                    segment = read_segment(tile_index, row, first_row)

                    def load_tile(j, count):
                        place = lax.rem(count, i32(places))
                        position = (segment.end - 1 - j) * keys
                        first_page = lax.div(position, i32(page_size))
                        pages = [tables_ref[row, first_page + n] for n in range(copies)]
                        within = pl.ds(lax.rem(position, i32(page_size)) if page_size > keys else 0, page_keys)
                        plgpu.barrier_wait(free.at[place])
                        for n, page in enumerate(pages):
                            plgpu.copy_gmem_to_smem(
                                pages_ref.at[page, within, kv_head],
                                tiles.at[place, pl.ds(n * page_keys, page_keys)],
                                ready.at[place],
                            )
                        return count + 1

                    return lax.fori_loop(i32(0), segment.end - segment.begin, load_tile, count)

                return lax.fori_loop(first_row, last_row + 1, load_row, count)

            drain(free, places, for_each_item(load_item, i32(0)))

        def attend_items():
            """A compute warpgroup: its half of every query tile."""
            for free, places in ((q_free, query_places), (k_free, key_places), (v_free, value_places)):
                for n in range(places):
                    plgpu.barrier_arrive(free.at[n])

            def with_outs(attend_item):
                """The outputs live in the accumulator of the value products, for which the interpreter has no store."""
                if interpret is None:
                    return pl.run_scoped(attend_item, ACCUMULATOR((HALF, head_dim), f32))
                outs = interpreted_outs[0].at[warpgroup]
                outs[...] = jnp.zeros((HALF, head_dim), f32)
                return attend_item(outs)

            def add_values(outs, weights, place):
                """outs += weights V, in the background. The interpreter has no weights in registers."""
                if interpret is None:
                    plgpu.wgmma(outs, weights, v_tiles.at[place])
                else:
                    outs[...] = outs[...] + jnp.dot(weights.astype(f32), v_tiles[place].astype(f32))
                    plgpu.commit_smem()  # it was read as the TMA unit does not read

            def previous_place(step):
                return lax.rem(step + (value_places - 1), i32(value_places))

            def attend_key_tile(i, state, outs, queries, tokens, segment, *, masked, is_first=False):
                """One step: the scores of key tile i, and the values of the tile before unless there is none."""
                highest, total, weights, step = state
                k_place, v_place = lax.rem(step, i32(key_places)), lax.rem(step, i32(value_places))
                previous = previous_place(step)
                plgpu.barrier_wait(k_ready.at[k_place])

                def multiply(scores):
                    plgpu.wgmma(scores, queries, k_tiles.at[k_place].T)
                    if not is_first:
                        add_values(outs, weights, previous)
                    return plgpu.wgmma_accumulator_load(scores, wait_n=0 if is_first else 1)

                scores = pl.run_scoped(multiply, ACCUMULATOR((HALF, keys), f32))
                plgpu.barrier_arrive(k_free.at[k_place])
                scores, factor = capped_scores(scores, scale, soft_cap)
                if masked:
                    last_key = jnp.where(
                        (tokens >= segment.first) & (tokens < segment.last), tokens + segment.shift, -1
                    )
                    last_key = lax.broadcast_in_dim(last_key, scores.shape, [0])
                    # Keys are shifted, not their bound: with that, ptxas makes even the unmasked loop 7 % slower.
                    key = plgpu.broadcasted_iota(i32, scores.shape, 1, layout=TILE) + i * keys
                    readable = key <= last_key
                    if sliding_window is not None:
                        readable &= key > last_key - sliding_window
                    scores = jnp.where(readable, scores, MASKED)
                new_highest = jnp.maximum(highest, scores.max(axis=1) * factor)
                decay = jnp.exp2(highest - new_highest)
                p = jnp.exp2(scores * factor - lax.broadcast_in_dim(new_highest, scores.shape, [0]))
                total = total * decay + p.sum(axis=1)
                if interpret is None:  # all of this while the value product runs
                    new_highest, total, decay, p = lax.optimization_barrier((new_highest, total, decay, p))
                plgpu.barrier_wait(v_ready.at[v_place])
                if not is_first:
                    done = outs[...]  # waits for the value product
                    plgpu.barrier_arrive(v_free.at[previous])
                    outs[...] = done * lax.broadcast_in_dim(decay, done.shape, [0])
                weights = p.astype(q.dtype)  # not earlier: the value product was reading these registers
                if masked:
                    pl.when((i + 1) * keys > segment.context)(lambda: clear_values(v_place, i, segment.context))
                return new_highest, total, weights, step + 1

            def clear_values(place, i, context):
                """Values behind the context become 0: a weight of 0 times NaN would be NaN."""

                @pl.when(warpgroup == 0)
                def _():
                    for offset in range(0, keys, 64):
                        part = pl.ds(offset, 64)
                        values = plgpu.load(v_tiles.at[place, part], layout=TILE)
                        key = plgpu.broadcasted_iota(i32, values.shape, 0, layout=TILE) + (i * keys + offset)
                        v_tiles[place, part] = jnp.where(key < context, values, jnp.zeros_like(values))
                    plgpu.commit_smem()

                # Both arrive: with one, it could come here twice before the other has waited once.
                plgpu.barrier_arrive(v_clean)
                plgpu.barrier_wait(v_clean)

            def attend_item(tile_index, first_row, last_row, head, state, outs):
                item, step = state
                query_place = lax.rem(item, i32(query_places))
                queries = q_tiles.at[query_place, warpgroup]
                start = tile_index * QUERIES + warpgroup * HALF
                tokens = plgpu.broadcasted_iota(i32, (HALF,), 0, layout=ROW) + start
                attend = functools.partial(attend_key_tile, outs=outs, queries=queries, tokens=tokens)
                plgpu.barrier_wait(q_ready.at[query_place])

                def attend_row(row, state):
                    segment = read_segment(tile_index, row, first_row)
                    end = segment.end - jnp.where(row == first_row, i32(1), i32(0))  # the first step has been made

                    def attend_backwards(low, high, state, *, masked):
                        step = functools.partial(attend, segment=segment, masked=masked)
                        return lax.fori_loop(low, high, lambda j, state: step(low + high - 1 - j, state), state)

                    inner_end = lax.min(segment.inner_end, end)
                    inner_begin = lax.min(segment.inner_begin, end)
                    state = attend_backwards(inner_end, end, state, masked=True)
                    state = attend_backwards(inner_begin, inner_end, state, masked=False)
                    if sliding_window is not None:
                        state = attend_backwards(segment.begin, inner_begin, state, masked=True)
                    return state

                highest = plgpu.layout_cast(jnp.full((HALF,), LOWEST, f32), ROW)
                total = plgpu.layout_cast(jnp.zeros((HALF,), f32), ROW)
                segment = read_segment(tile_index, first_row, first_row)
                state = attend(
                    segment.end - 1, (highest, total, None, step), segment=segment, masked=True, is_first=True
                )
                _, total, weights, step = lax.fori_loop(first_row, last_row + 1, attend_row, state)

                previous = previous_place(step)
                add_values(outs, weights, previous)
                inverse = jnp.where(total > 0, 1.0 / total, 0.0)
                done = outs[...]
                plgpu.barrier_arrive(v_free.at[previous])
                queries[...] = (done * lax.broadcast_in_dim(inverse, done.shape, [0])).astype(q.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(queries, out_ref.at[pl.ds(start, HALF), head])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(q_free.at[query_place])
                return item + 1, step

            def visit(*item):
                return with_outs(functools.partial(attend_item, *item))

            for_each_item(visit, (i32(0), i32(0)))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup < 2)
        def _():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            attend_items()

        @pl.when(warpgroup == 2)
        def _():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

            @plgpu.warp_map
            def _(warp):
                pl.when(warp == 0)(load_queries)
                pl.when(warp == 1)(lambda: load_pages(k_ref, k_tiles, k_ready, k_free, key_places))
                pl.when(warp == 2)(lambda: load_pages(v_ref, v_tiles, v_ready, v_free, value_places))

    transforms = swizzled(swizzle_bytes(head_dim, q.dtype), q.dtype)

    def tiles(places, *shape):
        return plgpu.SMEM((places, *shape, head_dim), q.dtype, transforms=transforms)

    scratch = [
        tiles(query_places, 2, HALF),
        tiles(key_places, keys),
        tiles(value_places, keys),
        plgpu.Barrier(num_arrivals=2, num_barriers=query_places),
        plgpu.Barrier(num_arrivals=copies, num_barriers=key_places),
        plgpu.Barrier(num_arrivals=copies, num_barriers=value_places),
        plgpu.Barrier(num_arrivals=2, num_barriers=query_places),
        plgpu.Barrier(num_arrivals=2, num_barriers=key_places),
        plgpu.Barrier(num_arrivals=2, num_barriers=value_places),
        plgpu.Barrier(num_arrivals=2),
    ]
    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=scratch if interpret is None else [*scratch, plgpu.SMEM((2, HALF, head_dim), f32)],
        grid=(num_programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_prefill",
    )
    return call(q, k_pages, v_pages, block_tables, rows, order)
