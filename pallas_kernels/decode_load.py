"""The memory warps of the decode kernel: they ask the TMA unit for page after page, and never compute."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_program import DecodeProgram, PhaseRefs, for_each_row, i32, part_of


def load_keys(program: DecodeProgram, phases: list[PhaseRefs], pages_ref):
    """One warp: the queries of all rows of the share, and the keys that they read."""
    ring = program.ring
    counts = _load_phases(program, phases, pages_ref, ring.k_tiles, ring.k_ready, with_queries=True)
    for refs, count in zip(phases, counts, strict=True):
        _for_last(2, count, lambda i, refs=refs: plgpu.barrier_wait(refs.q_free.at[i]))


def load_values(program: DecodeProgram, phases: list[PhaseRefs], pages_ref):
    """Another warp: the values of the same rows."""
    ring = program.ring
    _load_phases(program, phases, pages_ref, ring.v_tiles, ring.v_ready, with_queries=False)


def _load_phases(program: DecodeProgram, phases: list[PhaseRefs], pages_ref, tiles, ready, *, with_queries: bool):
    """All tiles of the share in order, until the last of them has been read; the number of rows of each phase."""
    step, counts = i32(0), []
    for refs in phases:
        step, count = _load_rows(program, refs, step, pages_ref, tiles, ready, with_queries=with_queries)
        counts.append(count)
    # Each time that a barrier opens must be waited for.
    _for_last(program.sizes.stages, step, lambda i: plgpu.barrier_wait(program.ring.free.at[i]))
    return counts


def _load_rows(program: DecodeProgram, refs: PhaseRefs, step, pages_ref, tiles, ready, *, with_queries: bool):
    def load_row(row, state):
        step, index = state
        first, end = refs.firsts[row], refs.ends[row]
        low, high, _ = part_of(program, refs, row)
        if with_queries:
            _load_queries(program, refs, row, index)

        def load_tile(i, step):
            return _load_tile(program, refs, row, first + i * program.sizes.keys, step, pages_ref, tiles, ready)

        return lax.fori_loop(low, jnp.where(end > 0, high, low), load_tile, step), index + 1

    return for_each_row(program, refs, load_row, step)


def _load_queries(program: DecodeProgram, refs: PhaseRefs, row, index):
    """Ask for a row's queries, as soon as those of the row before the last are done with."""
    place = lax.rem(index, i32(2))
    pl.when(index >= 2)(lambda: plgpu.barrier_wait(refs.q_free.at[place]))
    plgpu.copy_gmem_to_smem(refs.q.at[row, program.pack], refs.q_tiles.at[place], refs.q_ready.at[place])


def _load_tile(program: DecodeProgram, refs: PhaseRefs, row, position, step, pages_ref, tiles, ready):
    """Ask for the tile that begins at `position`, of each head of the pack, each as soon as its place is free."""
    keys, stages, page_size, page_keys, copies, heads = program.sizes[:6]
    pages = [refs.tables[row, lax.div(position, i32(page_size)) + j] for j in range(copies)]
    # A larger page holds several tiles. Written so that the compiler sees a multiple of `keys`.
    part = lax.rem(lax.div(position, i32(keys)), i32(max(1, page_size // keys)))
    within = pl.ds(part * keys if page_size > keys else 0, page_keys)

    def load_head(r, step):
        place = lax.rem(step, i32(stages))
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(program.ring.free.at[place]))
        for j, page in enumerate(pages):
            plgpu.copy_gmem_to_smem(
                pages_ref.at[page, within, program.pack * heads + r],
                tiles.at[place, pl.ds(j * page_keys, page_keys)],
                ready.at[place],
            )
        return step + 1

    return lax.fori_loop(0, heads, load_head, step)


def _for_last(size, count, body):
    """body(i % size) for the last `size` of `count` steps."""

    def step(i, _):
        body(lax.rem(i, i32(size)))

    lax.fori_loop(lax.max(count - size, i32(0)), count, step, None)
