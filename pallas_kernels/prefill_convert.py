"""fp8 pages in the prefill kernel: tiles become 16-bit floats between the TMA unit, which fills one place, and the
matrix unit, which reads another.

wgmma takes two operands of one width, and cannot transpose 8-bit ones; float16 holds every fp8 number exactly. Each
compute warpgroup converts half of every tile, and they meet once a step, before either multiplies: by then the keys of
this step and the values of the one before are whole. With two places for each, that is all that keeps them in order. A
warpgroup writes to the place of the step before the last; the other has come to the last meeting since it read there.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import TILE
from pallas_kernels.prefill_program import Places, PrefillProgram, i32

#: Rows of a block: the M of one wgmma, whose layout in registers the numbers pass through.
ROWS = 64


def convert_tile(program: PrefillProgram, pages: Places, into: Places, step, begin=None, end=None):
    """This warpgroup's half of the step's tile, as soon as that is there; rows before `begin` and from `end` on become
    0."""
    page_place, place = lax.rem(step, i32(pages.count)), lax.rem(step, i32(into.count))
    plgpu.barrier_wait(pages.ready.at[page_place])
    rows, columns = into.tiles.shape[1:]
    width = program.sizes.convert_columns
    assert width is not None, "pages of q's dtype are not converted"
    blocks = [(row, column) for row in range(0, rows, ROWS) for column in range(0, columns, width)]
    for warpgroup in range(2):

        @pl.when(program.warpgroup == warpgroup)
        def _(warpgroup=warpgroup):
            for row, column in blocks[warpgroup::2]:
                block = pl.ds(row, ROWS), pl.ds(column, width)
                _convert_block(pages.tiles.at[(page_place, *block)], into.tiles.at[(place, *block)], row, begin, end)

    plgpu.commit_smem()
    plgpu.barrier_arrive(pages.free.at[page_place])


def _convert_block(source, target, first_row: int, begin, end):
    values = plgpu.load(source, layout=TILE).astype(target.dtype)
    if end is not None:  # a weight of 0 times NaN would be NaN
        row = plgpu.broadcasted_iota(i32, values.shape, 0, layout=TILE) + first_row
        inside = row < end
        if begin is not None:
            inside &= row >= begin
        values = jnp.where(inside, values, jnp.zeros_like(values))
    target[...] = values
