"""The kernel behind `paged_decode`: two memory warps, one compute warpgroup, and a ring of tiles between them.

It runs over one or two `Phase`s in turn without emptying the ring between them: plain decoding has one, decoding over
shared prefixes reads those first.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_tile import DecodeTile
from pallas_kernels.mosaic import (
    ACCUMULATOR,
    COLUMN,
    MASKED,
    TILE,
    capped_scores,
    row_tiles,
    swizzle_bytes,
    swizzled,
)
from pallas_kernels.work_split import WorkSplit, chunk_tiles, pieces_of

Array = jax.Array
i32, f32 = jnp.int32, jnp.float32

#: Lower than any score, higher than MASKED: exp2(MASKED - LOWEST) is 0, for columns that have seen no key of theirs.
LOWEST = MASKED / 2


class Phase(NamedTuple):
    """Rows of queries, and the tiles that they read."""

    q: Array  # [B, K / R, N, D] queries of R KV heads each: N columns of a matrix product
    block_tables: Array  # i32[B, P]
    ends: Array  # i32[B] the position behind the last that the row reads; 0: it reads none
    split: WorkSplit


class Options(NamedTuple):
    """What the compiler must know besides shapes."""

    tile: DecodeTile
    group: int  # query heads of one KV head
    columns: int  # query columns of one row; a phase whose q has more stacks several rows side by side
    num_slots: tuple[int, ...]  # of each phase, for pieces
    out_dtype: jnp.dtype | None  # None: every row is left in pieces
    slots_per_row: int | None  # of a batch-invariant split
    scale: float
    soft_cap: float | None
    sliding_window: int | None


class Softmax(NamedTuple):
    """The running softmax of a row, in registers."""

    outs: tuple[Any, ...]  # f32[64, N] each: rows of the output's head_dim, not yet divided
    highest: Any  # f32[N] highest score so far, base 2
    sums: Any  # f32[keys, N] denominators, summed over the keys at the end


class PhaseRefs(NamedTuple):
    """A phase in device memory, its results, and its part of shared memory."""

    q: Any
    tables: Any
    ends: Any
    firsts: Any
    starts: Any
    cuts: Any
    rows: Any
    pieces: Any  # f32[K / R, slots, D, N]
    sums: Any  # f32[K / R, slots, 2, N]
    q_tiles: Any  # [2, N, D]
    weights: Any  # [N, keys]
    q_ready: Any
    q_free: Any


def attend(
    phases: tuple[Phase, ...],
    k_pages: Array,
    v_pages: Array,
    scales: tuple[Array, Array] | None,
    options: Options,
) -> tuple[list[Array], list[tuple[Array, Array]]]:
    """Outputs like q of the rows that one share holds whole (none without `out_dtype`); each phase's pieces and sums.

    Pages of another dtype than q's are converted to it tile by tile; `scales` f32[N or 1, K or 1] are their keys' and
    their values'.
    """
    tile, group, scale = options.tile, options.group, options.scale
    q = phases[0].q
    _, num_packs, _, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    heads = kv_heads // num_packs  # R, KV heads of a pack
    keys, stages = tile.keys, tile.stages
    page_keys = min(page_size, keys)  # keys that one copy brings
    copies = keys // page_keys
    offsets = row_tiles(head_dim)  # of the output's rows: Vᵀ P needs 64 at a time
    converts = k_pages.dtype != q.dtype
    ring_swizzle = swizzle_bytes(head_dim, k_pages.dtype)
    if converts:  # so many columns are converted at a time: 128 would not fit the registers
        ring_swizzle = min(ring_swizzle, 64)

    def kernel(k_ref, v_ref, scale_refs, phase_refs, results, scratch):
        out_refs, piece_refs = results
        phase_scratch, k_tiles, v_tiles, k_ready, v_ready, tile_free, out_tiles, converted = scratch
        phase_refs = [
            PhaseRefs(*arrays, *pieces, *own)
            for arrays, pieces, own in zip(phase_refs, piece_refs, phase_scratch, strict=True)
        ]
        share, pack = lax.axis_index("share"), lax.axis_index("pack")

        def part_of(refs, row):
            """The share's part [low, high) of the row's tiles, and their number."""
            start = refs.starts[row]
            tiles = refs.starts[row + 1] - start
            return lax.max(refs.cuts[share] - start, i32(0)), lax.min(refs.cuts[share + 1] - start, tiles), tiles

        def load(refs, step, *, pages_ref, tiles, ready, with_queries):
            """A memory warp: ask for the share's keys (or values) in order, each as soon as its place is free."""

            def load_row(row, state):
                step, index = state
                first, end = refs.firsts[row], refs.ends[row]
                low, high, _ = part_of(refs, row)
                if with_queries:
                    place = lax.rem(index, i32(2))
                    pl.when(index >= 2)(lambda: plgpu.barrier_wait(refs.q_free.at[place]))
                    plgpu.copy_gmem_to_smem(refs.q.at[row, pack], refs.q_tiles.at[place], refs.q_ready.at[place])

                def load_tile(i, step):
                    position = first + i * keys
                    pages = [refs.tables[row, lax.div(position, i32(page_size)) + j] for j in range(copies)]
                    # A larger page holds several tiles. Written so that the compiler sees a multiple of `keys`.
                    part = lax.rem(lax.div(position, i32(keys)), i32(max(1, page_size // keys)))
                    within = pl.ds(part * keys if page_size > keys else 0, page_keys)

                    def load_head(r, step):
                        place = lax.rem(step, i32(stages))
                        pl.when(step >= stages)(lambda: plgpu.barrier_wait(tile_free.at[place]))
                        for j, page in enumerate(pages):
                            plgpu.copy_gmem_to_smem(
                                pages_ref.at[page, within, pack * heads + r],
                                tiles.at[place, pl.ds(j * page_keys, page_keys)],
                                ready.at[place],
                            )
                        return step + 1

                    return lax.fori_loop(0, heads, load_head, step)

                return lax.fori_loop(low, jnp.where(end > 0, high, low), load_tile, step), index + 1

            return lax.fori_loop(refs.rows[0, share], refs.rows[1, share] + 1, load_row, (step, i32(0)))

        def load_all(*, with_queries, **what):
            step, counts = i32(0), []
            for refs in phase_refs:
                step, count = load(refs, step, with_queries=with_queries, **what)
                counts.append(count)
            # Each time that a barrier opens must be waited for.
            _for_last(stages, step, lambda i: plgpu.barrier_wait(tile_free.at[i]))
            for refs, count in zip(phase_refs, counts, strict=True):
                if with_queries:
                    _for_last(2, count, lambda i, refs=refs: plgpu.barrier_wait(refs.q_free.at[i]))

        def compute(refs, step):
            """The compute warpgroup: row after row, tile after tile, head after head."""
            columns = refs.q_tiles.shape[1]
            column = lax.rem(plgpu.broadcasted_iota(i32, (keys, columns), 1, layout=TILE), i32(options.columns))
            head_of_column = lax.div(column, i32(group))

            def attend_head(j, state, *, row, first, end, queries, window):
                """Step j of a row: tile j // R of head j % R; positions outside [window, end) are masked."""
                softmax, step = state
                place = lax.rem(step, i32(stages))
                k_tile, v_tile = k_tiles.at[place], v_tiles.at[place]
                key = first + lax.div(j, i32(heads)) * keys
                plgpu.barrier_wait(k_ready.at[place])
                if converts:
                    _convert(k_tile, converted[0], ring_swizzle)
                    plgpu.commit_smem()
                    k_tile = converted[0]

                def multiply_keys(acc):
                    plgpu.wgmma(acc, k_tile, refs.q_tiles.at[queries].T)
                    return acc[...]

                scores = pl.run_scoped(multiply_keys, ACCUMULATOR((keys, columns), f32))
                if converts:
                    k_scales, v_scales, v_scale = scales_of(row, key, end, pack * heads + lax.rem(j, i32(heads)))
                    scores = scores * k_scales
                scores, factor = capped_scores(scores, scale, options.soft_cap)
                scores = scores * factor
                if window is not None:
                    at = plgpu.broadcasted_iota(i32, (keys, columns), 0, layout=TILE) + key
                    scores = jnp.where((at >= window) & (at < end), scores, MASKED)
                if heads > 1:
                    scores = jnp.where(head_of_column == lax.rem(j, i32(heads)), scores, MASKED)
                highest = jnp.maximum(softmax.highest, scores.max(axis=0))
                decay = jnp.exp2(softmax.highest - highest)
                p = jnp.exp2(scores - lax.broadcast_in_dim(highest, scores.shape, [1]))
                sums = softmax.sums * lax.broadcast_in_dim(decay, scores.shape, [1]) + p
                plgpu.barrier_wait(v_ready.at[place])
                if converts:
                    _convert(v_tile, converted[1], ring_swizzle)
                    v_tile = converted[1]
                    p = p * v_scales
                if window is not None:  # a weight of 0 times NaN would be NaN
                    for offset in offsets:
                        part = v_tile.at[:, pl.ds(offset, 64)]
                        values = plgpu.load(part, layout=TILE)
                        at = plgpu.broadcasted_iota(i32, (keys, 64), 0, layout=TILE) + key
                        part[...] = jnp.where((at >= window) & (at < end), values, jnp.zeros_like(values))
                refs.weights.T[...] = p.astype(refs.weights.dtype)
                plgpu.commit_smem()

                def multiply_values(*accs):
                    for offset, acc in zip(offsets, accs, strict=True):
                        plgpu.wgmma(acc, v_tile.at[:, pl.ds(offset, 64)].T, refs.weights.T)
                    return [acc[...] for acc in accs]

                parts = pl.run_scoped(multiply_values, *[ACCUMULATOR((64, columns), f32) for _ in offsets])
                outs = []
                for out, part in zip(softmax.outs, parts, strict=True):
                    part = part * v_scale if converts else part
                    outs.append(out * lax.broadcast_in_dim(decay, out.shape, [1]) + part)
                plgpu.barrier_arrive(tile_free.at[place])
                return Softmax(tuple(outs), highest, sums), step + 1

            def scales_of(row, key, end, head):
                """Scales of a tile's keys and of its values, f32[keys, N]; the values' are divided by the last result.

                So weights stay below 1, where 16 bits are precise, however small the scales are.
                """
                k_of, v_of = (scales_by_page(ref, row, key, end, head) for ref in scale_refs)
                highest = functools.reduce(jnp.maximum, v_of, f32(1e-30))
                return by_key(k_of), by_key([scale / highest for scale in v_of]), highest

            def scales_by_page(ref, row, key, end, head):
                head = head if ref.shape[1] > 1 else 0
                if ref.shape[0] == 1:
                    return [ref[0, head]]
                page = lax.div(key, i32(page_size))
                scales = [ref[refs.tables[row, page + j], head] for j in range(copies)]
                # Of pages behind the end nothing is known.
                return [jnp.where(key + j * page_keys < end, scale, f32(0)) for j, scale in enumerate(scales)]

            def by_key(scales):
                page = lax.div(plgpu.broadcasted_iota(i32, (keys, columns), 0, layout=TILE), i32(page_keys))
                spread = plgpu.layout_cast(jnp.full((keys, columns), scales[0], f32), TILE)
                for j, scale in enumerate(scales[1:], 1):
                    spread = jnp.where(page == j, jnp.full_like(spread, scale), spread)
                return spread

            def attend_piece(row, low, high, queries, step):
                """Tiles [low, high) of the row -> their softmax, with `sums` summed over the keys; the next step."""
                first, end = refs.firsts[row], refs.ends[row]
                window = i32(0) if options.sliding_window is None else lax.max(end - options.sliding_window, i32(0))
                inside = functools.partial(attend_head, row=row, first=first, end=end, queries=queries, window=None)
                at_edge = functools.partial(inside, window=window)
                # Only the last tile, and the first of a window, hold positions outside of [window, end).
                inner_high = lax.clamp(low, lax.div(end - first, i32(keys)), high)
                inner_low = low
                state = _no_keys(keys, columns, len(offsets)), step
                if options.sliding_window is not None:
                    inner_low = lax.clamp(low, i32(1), inner_high)
                    state = lax.fori_loop(low * heads, inner_low * heads, at_edge, state)
                state = lax.fori_loop(inner_low * heads, inner_high * heads, inside, state)
                softmax, step = lax.fori_loop(inner_high * heads, high * heads, at_edge, state)
                return softmax._replace(sums=softmax.sums.sum(axis=0)), step

            def write_whole(row, softmax):
                inverse = jnp.where(softmax.sums > 0, 1.0 / softmax.sums, 0.0)
                (out_ref,), (out_tile,) = out_refs, out_tiles
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for offset, out in zip(offsets, softmax.outs, strict=True):
                    scaled = out * lax.broadcast_in_dim(inverse, out.shape, [1])
                    out_tile.at[:, pl.ds(offset, 64)].T[...] = scaled.astype(out_tile.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_tile, out_ref.at[row, pack])

            def write_piece(slot, softmax):
                for offset, out in zip(offsets, softmax.outs, strict=True):
                    refs.pieces[pack, slot, pl.ds(offset, 64)] = out
                refs.sums[pack, slot, 0] = softmax.highest
                refs.sums[pack, slot, 1] = softmax.sums

            def attend_row(row, state):
                step, index = state
                low, high, tiles = part_of(refs, row)
                queries = lax.rem(index, i32(2))
                plgpu.barrier_wait(refs.q_ready.at[queries])

                def finish(low, high, slot, step):
                    softmax, step = attend_piece(row, low, jnp.where(refs.ends[row] > 0, high, low), queries, step)
                    if options.out_dtype is None:
                        write_piece(slot, softmax)
                    else:
                        whole = (low == 0) & (high == tiles)
                        pl.when(whole)(lambda: write_whole(row, softmax))
                        pl.when(jnp.logical_not(whole))(lambda: write_piece(slot, softmax))
                    return step

                if options.slots_per_row is None:
                    step = finish(low, high, row + share, step)
                else:  # the share holds whole chunks
                    chunk = chunk_tiles(tiles)
                    first_slot, _ = pieces_of(row, refs.starts, refs.cuts, options.slots_per_row)

                    def attend_chunk(c, step):
                        chunk_low = low + c * chunk
                        slot = first_slot + lax.div(chunk_low, chunk)
                        return finish(chunk_low, lax.min(chunk_low + chunk, high), slot, step)

                    step = lax.fori_loop(i32(0), lax.div(high - low + chunk - 1, chunk), attend_chunk, step)
                plgpu.barrier_arrive(refs.q_free.at[queries])
                return step, index + 1

            step, _ = lax.fori_loop(refs.rows[0, share], refs.rows[1, share] + 1, attend_row, (step, i32(0)))
            return step

        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _():
            step = i32(0)
            for refs in phase_refs:
                step = compute(refs, step)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 1)
        def _():
            @plgpu.warp_map
            def _(warp):
                keys_of, values_of = dict(pages_ref=k_ref, tiles=k_tiles), dict(pages_ref=v_ref, tiles=v_tiles)
                pl.when(warp == 0)(lambda: load_all(**keys_of, ready=k_ready, with_queries=True))
                pl.when(warp == 1)(lambda: load_all(**values_of, ready=v_ready, with_queries=False))

    def phase_results(phase, slots):
        columns = phase.q.shape[2]
        return (
            jax.ShapeDtypeStruct((num_packs, slots, head_dim, columns), f32),
            jax.ShapeDtypeStruct((num_packs, slots, 2, columns), f32),
        )

    transforms = swizzled(swizzle_bytes(head_dim, q.dtype), q.dtype)

    def phase_scratch(phase):
        columns = phase.q.shape[2]
        return (
            plgpu.SMEM((2, columns, head_dim), q.dtype, transforms=transforms),
            plgpu.SMEM((columns, keys), q.dtype, transforms=transforms),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=2),
        )

    ring = plgpu.SMEM((stages, keys, head_dim), k_pages.dtype, transforms=swizzled(ring_swizzle, k_pages.dtype))
    tiles_ready = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    out_type, out_tiles = [], []
    if options.out_dtype is not None:
        out_type = [jax.ShapeDtypeStruct(q.shape, options.out_dtype)]
        out_tiles = [plgpu.SMEM((options.columns, head_dim), options.out_dtype, transforms=transforms)]
    num_outs = len(out_type)
    for phase, slots in zip(phases, options.num_slots, strict=True):
        out_type += phase_results(phase, slots)
    scratch_types = [phase_scratch(phase) for phase in phases]
    shared_memory = (
        scratch_types,
        ring,
        ring,
        tiles_ready,
        tiles_ready,
        plgpu.Barrier(num_barriers=stages),
        out_tiles,
        [plgpu.SMEM((keys, head_dim), q.dtype, transforms=transforms)] * (2 if converts else 0),
    )
    operands = (
        k_pages,
        v_pages,
        scales if converts else (),
        [(phase.q, phase.block_tables, phase.ends, *phase.split) for phase in phases],
    )
    flat_operands, operands_tree = jax.tree.flatten(operands)
    flat_scratch, scratch_tree = jax.tree.flatten(shared_memory, lambda node: not isinstance(node, tuple | list))

    def flat_kernel(*refs):
        inputs, outputs, scratch = _split(refs, len(flat_operands), len(out_type))
        k_ref, v_ref, scale_refs, phase_refs = operands_tree.unflatten(inputs)
        out_refs, piece_refs = _split(outputs, num_outs)
        piece_refs = list(zip(piece_refs[::2], piece_refs[1::2], strict=True))
        kernel(k_ref, v_ref, scale_refs, phase_refs, (out_refs, piece_refs), scratch_tree.unflatten(scratch))

    call = plgpu.kernel(
        flat_kernel,
        out_type=out_type,
        scratch_types=flat_scratch,
        grid=(phases[0].split.rows.shape[1], num_packs),
        grid_names=("share", "pack"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_decode",
    )
    outs, pieces = _split(call(*flat_operands), num_outs)
    return outs, list(zip(pieces[::2], pieces[1::2], strict=True))


def _split(items, *sizes):
    """Consecutive parts of the sizes given, and the rest."""
    parts = []
    for size in sizes:
        parts.append(items[:size])
        items = items[size:]
    return (*parts, items)


def _convert(tile, into, columns):
    """fp8 to 16 bits, which hold it exactly: wgmma cannot transpose an 8-bit operand."""
    for column in range(0, tile.shape[1], columns):
        part = pl.ds(column, columns)
        into[:, part] = plgpu.load(tile.at[:, part], layout=TILE).astype(into.dtype)


def _for_last(size, count, body):
    """body(i % size) for the last `size` of `count` steps."""

    def step(i, _):
        body(lax.rem(i, i32(size)))

    lax.fori_loop(lax.max(count - size, i32(0)), count, step, None)


def _no_keys(keys: int, columns: int, num_outs: int) -> Softmax:
    """The softmax before its first key."""
    out = plgpu.layout_cast(jnp.zeros((64, columns), f32), TILE)
    highest = plgpu.layout_cast(jnp.full((columns,), LOWEST, f32), COLUMN)
    return Softmax((out,) * num_outs, highest, plgpu.layout_cast(jnp.zeros((keys, columns), f32), TILE))
