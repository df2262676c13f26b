"""A compute warpgroup of the prefill kernel: its half of every query tile.

A step is one tile of keys, and has four seams: `_multiply` issues the scores of this tile and the values of the one
before, `_mask`, `_add_keys` (the running softmax) and `_rescale`. Keys are visited backwards, from the diagonal on.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import ACCUMULATOR, MASKED, ROW, TILE, capped_scores
from pallas_kernels.prefill_convert import convert_tile
from pallas_kernels.prefill_program import HALF, PrefillProgram, f32, for_each_item, i32, meet, read_segment
from pallas_kernels.query_tiles import QUERIES

#: Lower than any score, much higher than MASKED times any scale: the weight of a masked key, exp2(MASKED * scale -
#: highest), is 0 even for a token that has seen no key of its own.
LOWEST = -1e20


class Item(NamedTuple):
    """Half a query tile of one head, while it is being attended to."""

    queries: Any  # [HALF, D] in shared memory; its output takes their place
    tokens: Any  # i32[HALF] their places among the packed tokens
    outs: Any  # f32[HALF, D] the accumulator of the value products


class State(NamedTuple):
    """What goes from step to step, in registers."""

    highest: Any  # f32[HALF] highest score so far, base 2
    total: Any  # f32[HALF] sum of weights
    weights: Any  # [HALF, keys] of the tile before, whose values are still to be added; None before the first
    step: Any  # counts key tiles over all items, as the memory warps do


def attend_items(program: PrefillProgram, out_ref):
    """All items of this program, one after the other."""
    for places in (program.queries, program.key_pages, program.value_pages):
        for n in range(places.count):
            plgpu.barrier_arrive(places.free.at[n])

    def visit(*item):
        return _with_outs(program, out_ref, functools.partial(_attend_item, program, out_ref, *item))

    for_each_item(program, visit, (i32(0), i32(0)))
    plgpu.wait_smem_to_gmem(0)


def _with_outs(program: PrefillProgram, out_ref, attend_item):
    """The outputs live in the accumulator of the value products, for which the interpreter has no store."""
    shape = HALF, out_ref.shape[-1]
    if program.options.interpret is None:
        return pl.run_scoped(attend_item, ACCUMULATOR(shape, f32))
    outs = program.interpreted_outs[0].at[program.warpgroup]
    outs[...] = jnp.zeros(shape, f32)
    return attend_item(outs)


def _attend_item(program: PrefillProgram, out_ref, tile_index, first_row, last_row, head, state, outs):
    number, step = state
    query_place = lax.rem(number, i32(program.queries.count))
    queries = program.queries.tiles.at[query_place, program.warpgroup]
    start = tile_index * QUERIES + program.warpgroup * HALF
    tokens = plgpu.broadcasted_iota(i32, (HALF,), 0, layout=ROW) + start
    item = Item(queries, tokens, outs)
    plgpu.barrier_wait(program.queries.ready.at[query_place])

    highest = plgpu.layout_cast(jnp.full((HALF,), LOWEST, f32), ROW)
    total = plgpu.layout_cast(jnp.zeros((HALF,), f32), ROW)
    segment = read_segment(program, tile_index, first_row, first_row)
    state = State(highest, total, None, step)
    state = _attend_keys(program, item, segment, segment.end - 1, state, masked=True, is_first=True)

    def attend_row(row, state):
        return _attend_row(program, item, tile_index, row, first_row, state)

    state = lax.fori_loop(first_row, last_row + 1, attend_row, state)
    _write(program, item, state, out_ref.at[pl.ds(start, HALF), head])
    plgpu.barrier_arrive(program.queries.free.at[query_place])
    return number + 1, state.step


def _attend_row(program: PrefillProgram, item: Item, tile_index, row, first_row, state: State) -> State:
    """All key tiles of one row: at the diagonal, inside, and at the start of the window."""
    segment = read_segment(program, tile_index, row, first_row)
    end = segment.end - jnp.where(row == first_row, i32(1), i32(0))  # the first step has been made

    def attend_backwards(low, high, state, *, masked):
        def attend(j, state):
            return _attend_keys(program, item, segment, low + high - 1 - j, state, masked=masked)

        return lax.fori_loop(low, high, attend, state)

    inner_end = lax.min(segment.inner_end, end)
    inner_begin = lax.min(segment.inner_begin, end)
    state = attend_backwards(inner_end, end, state, masked=True)
    state = attend_backwards(inner_begin, inner_end, state, masked=False)
    if program.options.sliding_window is not None:
        state = attend_backwards(segment.begin, inner_begin, state, masked=True)
    return state


def _attend_keys(
    program: PrefillProgram, item: Item, segment, i, state: State, *, masked: bool, is_first=False
) -> State:
    """One step: the scores of key tile i, and the values of the tile before unless there is none."""
    keys, values, converts = program.keys, program.values, program.sizes.convert_columns is not None
    highest, total, weights, step = state
    k_place, v_place = lax.rem(step, i32(keys.count)), lax.rem(step, i32(values.count))
    previous = _previous_place(program, step)
    if converts:
        convert_tile(program, program.key_pages, keys, step)
        meet(program)
    else:
        plgpu.barrier_wait(keys.ready.at[k_place])
    scores = _multiply(program, item, k_place, None if is_first else (weights, previous))
    if not converts:
        plgpu.barrier_arrive(keys.free.at[k_place])
    scores, factor = capped_scores(scores, program.options.scale, program.options.soft_cap)
    if masked:
        scores = _mask(scores, item.tokens, segment, i, program.options.sliding_window)
    highest, total, decay, p = _add_keys(highest, total, scores, factor)
    if program.options.interpret is None:  # all of this while the value product runs
        highest, total, decay, p = lax.optimization_barrier((highest, total, decay, p))
    first_key, tile_keys = _first_key(segment, program.options.sliding_window), program.sizes.keys
    if converts:
        begin = None if first_key is None else first_key - i * tile_keys
        convert_tile(program, program.value_pages, values, step, begin, segment.context - i * tile_keys)
    else:
        plgpu.barrier_wait(values.ready.at[v_place])
    if not is_first:
        _rescale(program, item.outs, decay, previous)
    weights = p.astype(item.queries.dtype)  # not earlier: the value product was reading these registers
    if masked and not converts:
        is_outside = (i + 1) * tile_keys > segment.context
        if first_key is not None:
            is_outside |= i * tile_keys < first_key
        pl.when(is_outside)(lambda: _clear_values(program, v_place, i, first_key, segment.context))
    return State(highest, total, weights, step + 1)


def _multiply(program: PrefillProgram, item: Item, k_place, values):
    """Q Kᵀ of this tile, f32[HALF, keys]; in the background P V of the tile before: `values` has P and V's place."""

    def multiply(scores):
        plgpu.wgmma(scores, item.queries, program.keys.tiles.at[k_place].T)
        if values is not None:
            _add_values(program, item.outs, *values)
        return plgpu.wgmma_accumulator_load(scores, wait_n=0 if values is None else 1)

    return pl.run_scoped(multiply, ACCUMULATOR((HALF, program.sizes.keys), f32))


def _add_values(program: PrefillProgram, outs, weights, place):
    """outs += weights V, in the background. The interpreter has no weights in registers."""
    tiles = program.values.tiles
    if program.options.interpret is None:
        plgpu.wgmma(outs, weights, tiles.at[place])
    else:
        outs[...] = outs[...] + jnp.dot(weights.astype(f32), tiles[place].astype(f32))
        plgpu.commit_smem()  # it was read as the TMA unit does not read


def _mask(scores, tokens, segment, i, sliding_window: int | None):
    last_key = jnp.where((tokens >= segment.first) & (tokens < segment.last), tokens + segment.shift, -1)
    last_key = lax.broadcast_in_dim(last_key, scores.shape, [0])
    # Keys are shifted, not their bound: with that, ptxas makes even the unmasked loop 7 % slower.
    key = plgpu.broadcasted_iota(i32, scores.shape, 1, layout=TILE) + i * scores.shape[1]
    readable = key <= last_key
    if sliding_window is not None:
        readable &= key > last_key - sliding_window
    return jnp.where(readable, scores, MASKED)


def _add_keys(highest, total, scores, factor):
    """The highest score and the sum of weights with this tile's, by what earlier results decay, and its weights."""
    new_highest = jnp.maximum(highest, scores.max(axis=1) * factor)
    decay = jnp.exp2(highest - new_highest)
    p = jnp.exp2(scores * factor - lax.broadcast_in_dim(new_highest, scores.shape, [0]))
    return new_highest, total * decay + p.sum(axis=1), decay, p


def _rescale(program: PrefillProgram, outs, decay, place):
    done = outs[...]  # waits for the value product
    _free_values(program, place)
    outs[...] = done * lax.broadcast_in_dim(decay, done.shape, [0])


def _first_key(segment, sliding_window: int | None):
    """The first key that some token of the segment reads; if it has no token, the end of its context."""
    if sliding_window is None:
        return None
    first_key = segment.first + segment.shift - (sliding_window - 1)
    return jnp.where(segment.first < segment.last, first_key, segment.context)


def _clear_values(program: PrefillProgram, place, i, first_key, context):
    """Values behind the context, and in front of all windows, become 0: a weight of 0 times NaN would be NaN."""
    tiles, keys = program.values.tiles, program.sizes.keys

    @pl.when(program.warpgroup == 0)
    def _():
        for offset in range(0, keys, 64):
            part = pl.ds(offset, 64)
            values = plgpu.load(tiles.at[place, part], layout=TILE)
            key = plgpu.broadcasted_iota(i32, values.shape, 0, layout=TILE) + (i * keys + offset)
            inside = key < context
            if first_key is not None:
                inside &= key >= first_key
            tiles[place, part] = jnp.where(inside, values, jnp.zeros_like(values))
        plgpu.commit_smem()

    meet(program)


def _write(program: PrefillProgram, item: Item, state: State, out_ref):
    """The values of the last tile, the division, and the output by way of where the queries were."""
    previous = _previous_place(program, state.step)
    if program.sizes.convert_columns is not None:
        meet(program)
    _add_values(program, item.outs, state.weights, previous)
    inverse = jnp.where(state.total > 0, 1.0 / state.total, 0.0)
    done = item.outs[...]
    _free_values(program, previous)
    item.queries[...] = (done * lax.broadcast_in_dim(inverse, done.shape, [0])).astype(item.queries.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(item.queries, out_ref)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _free_values(program: PrefillProgram, place):
    """The product over the values in this place is done; places that are filled here need no barrier to say so."""
    if program.sizes.convert_columns is None:
        plgpu.barrier_arrive(program.values.free.at[place])


def _previous_place(program: PrefillProgram, step):
    return lax.rem(step + (program.values.count - 1), i32(program.values.count))
