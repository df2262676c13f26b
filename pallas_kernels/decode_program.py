"""What one program of the decode kernel has to hand: sizes, its share of the work, and the ring between its warps.

The memory warps (`decode_load.py`) and the compute warpgroup (`decode_compute.py`) see nothing else of each other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_tile import DecodeTile

i32, f32 = jnp.int32, jnp.float32


class DecodeOptions(NamedTuple):
    """What the compiler must know besides shapes."""

    tile: DecodeTile
    group: int  # query heads of one KV head
    columns: int  # query columns of one row; a phase whose q has more stacks several rows side by side
    max_pieces: tuple[int, ...]  # of each phase, that rows are left in
    out_dtype: jnp.dtype | None  # None: every row is left in pieces
    pieces_per_row: int | None  # of a batch-invariant split
    scale: float
    soft_cap: float | None
    sliding_window: int | None


class DecodeSizes(NamedTuple):
    """What follows from the shapes and the tile."""

    keys: int  # of a tile
    stages: int  # places of the ring
    page_size: int
    page_keys: int  # keys that one copy brings
    copies: int  # that bring one tile
    heads: int  # R, KV heads of a pack
    offsets: tuple[int, ...]  # where blocks of 64 rows of the output begin: Vᵀ P needs 64 at a time
    convert_columns: int | None  # of fp8 pages: columns that are converted at a time; None: q's dtype, as they lie


class Ring(NamedTuple):
    """Tiles on their way from the memory warps to the compute warpgroup, and the barriers of each place."""

    k_tiles: Any  # [stages, keys, D]
    v_tiles: Any
    k_ready: Any  # opens when all copies of the tile have arrived
    v_ready: Any
    free: Any  # opens when the compute warpgroup has read both tiles of the place
    converted: tuple[Any, ...]  # of fp8 pages: a tile of keys and one of values [keys, D] in q's dtype


class PhaseRefs(NamedTuple):
    """A phase in device memory, its results, and its part of shared memory."""

    q: Any
    tables: Any
    ends: Any
    firsts: Any
    starts: Any
    cuts: Any
    rows: Any
    pieces: Any  # f32[K / R, pieces, D, N]
    sums: Any  # f32[K / R, pieces, 2, N]
    q_tiles: Any  # [2, N, D]
    weights: Any  # [N, keys]
    q_ready: Any
    q_free: Any


class DecodeProgram(NamedTuple):
    """One program: an equal share of all tiles, for one pack of KV heads."""

    options: DecodeOptions
    sizes: DecodeSizes
    share: Any
    pack: Any
    ring: Ring
    scales: tuple[Any, ...]  # of fp8 pages: f32[N or 1, K or 1] of keys and of values
    outs: tuple[Any, ...]  # the output [B, K / R, N, D] and its tile [N, D], unless every row is left in pieces


def part_of(program: DecodeProgram, refs: PhaseRefs, row):
    """The share's part [low, high) of the row's tiles, and their number."""
    start = refs.starts[row]
    tiles = refs.starts[row + 1] - start
    share = program.share
    return lax.max(refs.cuts[share] - start, i32(0)), lax.min(refs.cuts[share + 1] - start, tiles), tiles


def for_each_row(program: DecodeProgram, refs: PhaseRefs, visit, step):
    """(step, index) = visit(row, (step, index)) for the share's rows in order -> the last step, the number of rows."""
    first, last = refs.rows[0, program.share], refs.rows[1, program.share]
    return lax.fori_loop(first, last + 1, visit, (step, i32(0)))
