"""The compute warpgroup of the decode kernel: row after row, tile after tile, head after head.

A step is one tile of one KV head, and has four seams: `_multiply_keys` (scores), `_mask`, `_add_keys` (the running
softmax) and `_multiply_values`. What comes out of a row's tiles is written by `_write_whole` or `_write_piece`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_program import DecodeProgram, PhaseRefs, f32, for_each_row, i32, part_of
from pallas_kernels.mosaic import ACCUMULATOR, COLUMN, MASKED, TILE, capped_scores
from pallas_kernels.work_split import chunk_tiles, pieces_of

#: Lower than any score, higher than MASKED: exp2(MASKED - LOWEST) is 0, for columns that have seen no key of theirs.
LOWEST = MASKED / 2


class Softmax(NamedTuple):
    """The running softmax of a row, in registers."""

    outs: tuple[Any, ...]  # f32[64, N] each: rows of the output's head_dim, not yet divided
    highest: Any  # f32[N] highest score so far, base 2
    sums: Any  # f32[keys, N] denominators, summed over the keys at the end


class Row(NamedTuple):
    """The row that is being attended to."""

    index: Any
    first: Any  # position of the first key that it reads in this phase
    end: Any  # position behind its last key
    queries: Any  # place of its queries


class Window(NamedTuple):
    """Positions that may be read; the others of a tile are masked."""

    begin: Any
    end: Any


def compute(program: DecodeProgram, refs: PhaseRefs, step):
    """All rows of the share in one phase; `step` counts tiles over all phases, as the memory warps do."""
    keys, columns = program.sizes.keys, refs.q_tiles.shape[1]
    column = lax.rem(plgpu.broadcasted_iota(i32, (keys, columns), 1, layout=TILE), i32(program.options.columns))
    head_of_column = lax.div(column, i32(program.options.group))

    def attend_row(row, state):
        step, index = state
        return _attend_row(program, refs, head_of_column, row, step, index), index + 1

    step, _ = for_each_row(program, refs, attend_row, step)
    return step


def _attend_row(program: DecodeProgram, refs: PhaseRefs, head_of_column, row, step, index):
    """The share's part of one row, whole or in pieces -> the next step."""
    low, high, tiles = part_of(program, refs, row)
    queries = lax.rem(index, i32(2))
    plgpu.barrier_wait(refs.q_ready.at[queries])

    def finish(low, high, piece, step):
        high_read = jnp.where(refs.ends[row] > 0, high, low)
        softmax, step = _attend_piece(program, refs, head_of_column, row, queries, low, high_read, step)
        if program.options.out_dtype is None:
            _write_piece(program, refs, piece, softmax)
        else:
            whole = (low == 0) & (high == tiles)
            pl.when(whole)(lambda: _write_whole(program, row, softmax))
            pl.when(jnp.logical_not(whole))(lambda: _write_piece(program, refs, piece, softmax))
        return step

    if program.options.pieces_per_row is None:
        step = finish(low, high, row + program.share, step)
    else:  # the share holds whole chunks
        chunk = chunk_tiles(tiles)
        first_piece, _ = pieces_of(row, refs.starts, refs.cuts, program.options.pieces_per_row)

        def attend_chunk(c, step):
            chunk_low = low + c * chunk
            piece = first_piece + lax.div(chunk_low, chunk)
            return finish(chunk_low, lax.min(chunk_low + chunk, high), piece, step)

        step = lax.fori_loop(i32(0), lax.div(high - low + chunk - 1, chunk), attend_chunk, step)
    plgpu.barrier_arrive(refs.q_free.at[queries])
    return step


def _attend_piece(program: DecodeProgram, refs: PhaseRefs, head_of_column, row, queries, low, high, step):
    """Tiles [low, high) of the row -> their softmax, with `sums` summed over the keys; the next step."""
    keys, heads, sliding_window = program.sizes.keys, program.sizes.heads, program.options.sliding_window
    first, end = refs.firsts[row], refs.ends[row]
    begin = i32(0) if sliding_window is None else lax.max(end - sliding_window, i32(0))
    attend = functools.partial(_attend_tile, program, refs, head_of_column, Row(row, first, end, queries))
    inside = functools.partial(attend, window=None)
    at_edge = functools.partial(attend, window=Window(begin, end))
    # Only the last tile, and the first of a window, hold positions outside of the window.
    inner_high = lax.clamp(low, lax.div(end - first, i32(keys)), high)
    inner_low = low
    state = _no_keys(keys, refs.q_tiles.shape[1], len(program.sizes.offsets)), step
    if sliding_window is not None:
        inner_low = lax.clamp(low, i32(1), inner_high)
        state = lax.fori_loop(low * heads, inner_low * heads, at_edge, state)
    state = lax.fori_loop(inner_low * heads, inner_high * heads, inside, state)
    softmax, step = lax.fori_loop(inner_high * heads, high * heads, at_edge, state)
    return softmax._replace(sums=softmax.sums.sum(axis=0)), step


def _attend_tile(program: DecodeProgram, refs: PhaseRefs, head_of_column, row: Row, j, state, *, window: Window | None):
    """Step j of a row: tile j // R of head j % R."""
    (keys, stages, *_), ring, heads = program.sizes, program.ring, program.sizes.heads
    softmax, step = state
    place = lax.rem(step, i32(stages))
    key = row.first + lax.div(j, i32(heads)) * keys
    scores = _multiply_keys(program, refs, place, row.queries)
    scales = None
    if program.sizes.convert_columns is not None:
        scales = _scales_of(program, refs, row, key, program.pack * heads + lax.rem(j, i32(heads)))
        scores = scores * scales.keys
    scores, factor = capped_scores(scores, program.options.scale, program.options.soft_cap)
    scores = _mask(scores * factor, key, window)
    if heads > 1:
        scores = jnp.where(head_of_column == lax.rem(j, i32(heads)), scores, MASKED)
    weights, decay, highest, sums = _add_keys(softmax, scores)
    parts = _multiply_values(program, refs, place, weights, key, window, scales)
    outs = []
    for out, part in zip(softmax.outs, parts, strict=True):
        part = part if scales is None else part * scales.highest_value
        outs.append(out * lax.broadcast_in_dim(decay, out.shape, [1]) + part)
    plgpu.barrier_arrive(ring.free.at[place])
    return Softmax(tuple(outs), highest, sums), step + 1


def _multiply_keys(program: DecodeProgram, refs: PhaseRefs, place, queries):
    """K Qᵀ of the tile, as soon as it is there: f32[keys, N]."""
    ring, shape = program.ring, (program.sizes.keys, refs.q_tiles.shape[1])
    k_tile = ring.k_tiles.at[place]
    plgpu.barrier_wait(ring.k_ready.at[place])
    if program.sizes.convert_columns is not None:
        k_tile = _convert(k_tile, ring.converted[0], program.sizes.convert_columns)
        plgpu.commit_smem()

    def multiply(acc):
        plgpu.wgmma(acc, k_tile, refs.q_tiles.at[queries].T)
        return acc[...]

    return pl.run_scoped(multiply, ACCUMULATOR(shape, f32))


def _mask(scores, key, window: Window | None):
    if window is None:
        return scores
    return jnp.where(_is_inside(scores.shape, key, window), scores, MASKED)


def _is_inside(shape, key, window: Window):
    """Whether the position of each row of a tile that begins at `key` is in the window."""
    at = plgpu.broadcasted_iota(i32, shape, 0, layout=TILE) + key
    return (at >= window.begin) & (at < window.end)


def _add_keys(softmax: Softmax, scores):
    """The tile's weights, by what earlier results decay, the highest score and the denominators."""
    highest = jnp.maximum(softmax.highest, scores.max(axis=0))
    decay = jnp.exp2(softmax.highest - highest)
    weights = jnp.exp2(scores - lax.broadcast_in_dim(highest, scores.shape, [1]))
    sums = softmax.sums * lax.broadcast_in_dim(decay, scores.shape, [1]) + weights
    return weights, decay, highest, sums


def _multiply_values(program: DecodeProgram, refs: PhaseRefs, place, weights, key, window: Window | None, scales):
    """Vᵀ P of the tile, as soon as it is there: f32[64, N] for each block of the output's rows."""
    ring, offsets = program.ring, program.sizes.offsets
    v_tile = ring.v_tiles.at[place]
    plgpu.barrier_wait(ring.v_ready.at[place])
    if program.sizes.convert_columns is not None:
        v_tile = _convert(v_tile, ring.converted[1], program.sizes.convert_columns)
        weights = weights * scales.values
    if window is not None:
        _clear_outside(v_tile, offsets, key, window)
    refs.weights.T[...] = weights.astype(refs.weights.dtype)
    plgpu.commit_smem()

    def multiply(*accs):
        for offset, acc in zip(offsets, accs, strict=True):
            plgpu.wgmma(acc, v_tile.at[:, pl.ds(offset, 64)].T, refs.weights.T)
        return [acc[...] for acc in accs]

    return pl.run_scoped(multiply, *[ACCUMULATOR((64, refs.q_tiles.shape[1]), f32) for _ in offsets])


def _clear_outside(v_tile, offsets, key, window: Window):
    """Values outside of the window become 0: a weight of 0 times NaN would be NaN."""
    for offset in offsets:
        part = v_tile.at[:, pl.ds(offset, 64)]
        values = plgpu.load(part, layout=TILE)
        inside = _is_inside((v_tile.shape[0], 64), key, window)
        part[...] = jnp.where(inside, values, jnp.zeros_like(values))


# What a row's tiles gave


def _write_whole(program: DecodeProgram, row, softmax: Softmax):
    """A row that lies in one share is divided by its denominators."""
    inverse = jnp.where(softmax.sums > 0, 1.0 / softmax.sums, 0.0)
    out_ref, out_tile = program.outs
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for offset, out in zip(program.sizes.offsets, softmax.outs, strict=True):
        scaled = out * lax.broadcast_in_dim(inverse, out.shape, [1])
        out_tile.at[:, pl.ds(offset, 64)].T[...] = scaled.astype(out_tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_tile, out_ref.at[row, program.pack])


def _write_piece(program: DecodeProgram, refs: PhaseRefs, piece, softmax: Softmax):
    """A piece of a row is left for `merge.py`, as it is."""
    for offset, out in zip(program.sizes.offsets, softmax.outs, strict=True):
        refs.pieces[program.pack, piece, pl.ds(offset, 64)] = out
    refs.sums[program.pack, piece, 0] = softmax.highest
    refs.sums[program.pack, piece, 1] = softmax.sums


def _no_keys(keys: int, columns: int, num_outs: int) -> Softmax:
    """The softmax before its first key."""
    out = plgpu.layout_cast(jnp.zeros((64, columns), f32), TILE)
    highest = plgpu.layout_cast(jnp.full((columns,), LOWEST, f32), COLUMN)
    return Softmax((out,) * num_outs, highest, plgpu.layout_cast(jnp.zeros((keys, columns), f32), TILE))


# fp8 pages


class Scales(NamedTuple):
    """Of a tile, f32[keys, N]. Those of values are divided by the highest of them, and the result multiplied by it.

    So weights stay below 1, where 16 bits are precise, however small the scales are.
    """

    keys: Any
    values: Any
    highest_value: Any  # f32


def _scales_of(program: DecodeProgram, refs: PhaseRefs, row: Row, key, head) -> Scales:
    k_of, v_of = (_scales_by_page(program, refs, ref, row, key, head) for ref in program.scales)
    highest = functools.reduce(jnp.maximum, v_of, f32(1e-30))
    shape, page_keys = (program.sizes.keys, refs.q_tiles.shape[1]), program.sizes.page_keys
    return Scales(_by_key(k_of, shape, page_keys), _by_key([v / highest for v in v_of], shape, page_keys), highest)


def _scales_by_page(program: DecodeProgram, refs: PhaseRefs, ref, row: Row, key, head):
    head = head if ref.shape[1] > 1 else 0
    if ref.shape[0] == 1:
        return [ref[0, head]]
    page = lax.div(key, i32(program.sizes.page_size))
    scales = [ref[refs.tables[row.index, page + j], head] for j in range(program.sizes.copies)]
    # Of pages behind the end nothing is known.
    return [jnp.where(key + j * program.sizes.page_keys < row.end, scale, f32(0)) for j, scale in enumerate(scales)]


def _by_key(scales, shape, page_keys: int):
    """One scale for each page of a tile, spread over the page's keys."""
    page = lax.div(plgpu.broadcasted_iota(i32, shape, 0, layout=TILE), i32(page_keys))
    spread = plgpu.layout_cast(jnp.full(shape, scales[0], f32), TILE)
    for j, scale in enumerate(scales[1:], 1):
        spread = jnp.where(page == j, jnp.full_like(spread, scale), spread)
    return spread


def _convert(tile, into, columns: int):
    """fp8 to 16 bits, which hold it exactly: wgmma cannot transpose an 8-bit operand."""
    for column in range(0, tile.shape[1], columns):
        part = pl.ds(column, columns)
        into[:, part] = plgpu.load(tile.at[:, part], layout=TILE).astype(into.dtype)
    return into
