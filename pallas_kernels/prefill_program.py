"""What one program of the prefill kernel has to hand, and the order in which it takes up query tiles.

The memory warps (`prefill_load.py`) and the two compute warpgroups (`prefill_compute.py`) walk the same items, rows and
key tiles, each at its own pace; tiles and barriers are all that they share.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.query_tiles import QUERIES, segment_of

i32, f32 = jnp.int32, jnp.float32

#: Query tokens of one compute warpgroup.
HALF = QUERIES // 2


class PrefillOptions(NamedTuple):
    """What the compiler must know besides shapes."""

    scale: float
    soft_cap: float | None
    sliding_window: int | None
    num_programs: int
    interpret: Any


class PrefillSizes(NamedTuple):
    """What follows from the shapes and the tile."""

    heads: int
    kv_heads: int
    keys: int  # of a tile
    page_size: int
    page_keys: int  # keys that one copy brings
    copies: int  # that bring one tile
    num_items: int  # query tiles times heads
    convert_columns: int | None  # of fp8 pages: columns that are converted at a time; None: q's dtype, as they lie


class Places(NamedTuple):
    """Tiles of one kind in shared memory, and when each is there and when it may be filled again.

    Without barriers for tiles that the compute warpgroups fill themselves.
    """

    tiles: Any  # [places, 2, HALF, D] of queries, [places, keys, D] of keys or values
    ready: Any
    free: Any
    count: int


class PrefillProgram(NamedTuple):
    """One program: every `num_programs`-th item, an item being one query tile of one head."""

    options: PrefillOptions
    sizes: PrefillSizes
    index: Any  # of the program
    warpgroup: Any
    tables: Any  # i32[B, P]
    rows: Any  # i32[B, 3] start, queries and context
    order: Any  # i32[tiles, 3] query tile, its first and its last row
    queries: Places
    keys: Places  # what is multiplied, in q's dtype
    values: Places
    key_pages: Places  # what is loaded: the same, unless pages are of fp8
    value_pages: Places
    met: Any  # opens when both compute warpgroups have come, so that what each wrote to a tile is there for the other
    interpreted_outs: tuple[Any, ...]  # f32[2, HALF, D], for the interpreter alone


def for_each_item(program: PrefillProgram, visit, state):
    """state = visit(query tile, its first row, its last row, head, state) for what this program is to do."""
    num_programs, num_items = program.options.num_programs, program.sizes.num_items
    heads, order = program.sizes.heads, program.order

    def item_at(turn):
        return turn * num_programs + jnp.where(turn % 2 == 0, program.index, num_programs - 1 - program.index)

    def visit_turn(turn, state):
        item = item_at(turn)
        index = lax.div(item, i32(heads))
        return visit(order[index, 0], order[index, 1], order[index, 2], lax.rem(item, i32(heads)), state)

    turns = i32(num_items // num_programs)
    turns += jnp.where(item_at(turns) < num_items, i32(1), i32(0))
    return lax.fori_loop(i32(0), turns, visit_turn, state)


def read_segment(program: PrefillProgram, tile_index, row, first_row):
    """The key tiles that a row's tokens of a query tile read (query_tiles.py)."""
    # A query tile's first segment has at least one key tile, so that there always is a first step.
    at_least = jnp.where(row == first_row, i32(1), i32(0))
    start, length, context = program.rows[row, 0], program.rows[row, 1], program.rows[row, 2]
    return segment_of(
        tile_index, start, length, context, at_least=at_least, keys=program.sizes.keys,
        sliding_window=program.options.sliding_window,
    )  # fmt: skip


def meet(program: PrefillProgram):
    """The compute warpgroups wait for each other; what either wrote to shared memory and committed is there for both.

    Both arrive: with one, it could come here twice before the other has waited once.
    """
    plgpu.barrier_arrive(program.met)
    plgpu.barrier_wait(program.met)


def drain(places: Places, count):
    """Every phase of a barrier must be waited for: when all is loaded, until all is free."""
    for n in range(places.count):
        plgpu.barrier_wait(places.free.at[lax.rem(count + n, i32(places.count))])
