"""What a step of beams leaves to the next one: tables, sums and parents, all of which the host learns later.

A beam that goes on takes over what its parent has, row by row: that is what `descend` does for block tables, as
host/pages/beam_tables.py has it, and `of_parents` for anything else that is kept a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpaged.device.beam_candidates import NextBeams
from jaxpaged.step_io import NO_TOKEN, NULL_PAGE, DecodeInputs

Array = jax.Array


class CarriedBeams(NamedTuple):
    """Of the rows of a decode step."""

    tables: Array  # i32[B, P] as the step read them
    parents: Array  # i32[B] row that each row of the next step continues; its own where there is no beam
    scores: Array  # f32[B] sums of the next step's beams; of other rows 0


def carry(inputs: DecodeInputs, beams: NextBeams, beam_rows: Array) -> tuple[CarriedBeams, Array]:
    """What the next step begins with, and the tokens i32[B] of its beams; NO_TOKEN in other rows."""
    num_rows = len(inputs.context_lens)
    places = jnp.where(beam_rows >= 0, beam_rows, num_rows)  # out of range: dropped
    parents = jnp.take_along_axis(beam_rows, beams.parents, axis=1)

    def in_rows(values: Array, others: Array) -> Array:
        return others.at[places].set(values, mode="drop")

    own = jnp.arange(num_rows, dtype=jnp.int32)
    kept = CarriedBeams(
        tables=inputs.block_tables,
        parents=in_rows(parents, own),
        scores=in_rows(beams.scores, jnp.zeros(num_rows, jnp.float32)),
    )
    return kept, in_rows(beams.tokens, jnp.full_like(own, NO_TOKEN))


def of_parents(kept: Any, carried: CarriedBeams) -> Any:
    """What is kept a row, arrays [B, ...], for the rows of the next step."""
    return jax.tree.map(lambda values: values[carried.parents], kept)


def descend(inputs: DecodeInputs, carried: CarriedBeams, page_size: int) -> DecodeInputs:
    """The inputs with the tables of this step's rows, with the copies that it begins with, and with its slots."""
    rows, width = jnp.arange(len(inputs.positions), dtype=jnp.int32), inputs.block_tables.shape[1]
    before = jnp.pad(carried.tables, ((0, 0), (0, width - carried.tables.shape[1])), constant_values=NULL_PAGE)
    tables = of_parents(before, carried)
    columns, offsets = inputs.positions // page_size, inputs.positions % page_size
    last = tables[rows, columns]
    # The first child keeps its parent's last page, the n-th other one takes that of the n-th beam without children.
    first = jnp.full(len(rows), len(rows), jnp.int32).at[carried.parents].min(rows)
    is_further, is_childless = first[carried.parents] != rows, first == len(rows)
    childless = jnp.nonzero(is_childless, size=len(rows), fill_value=0)[0]
    donors = childless[jnp.maximum(jnp.cumsum(is_further) - 1, 0)]
    is_copied = is_further & (offsets > 0)
    targets = before[donors, columns]
    pages = jnp.where(offsets == 0, inputs.fresh_pages, jnp.where(is_copied, targets, last))
    nothing = jnp.full_like(last, NULL_PAGE)
    return inputs._replace(
        block_tables=tables.at[rows, columns].set(pages),
        slot_mapping=pages * page_size + offsets,
        copies=jnp.stack([jnp.where(is_copied, last, nothing), jnp.where(is_copied, targets, nothing)]),
        fresh_pages=None,
    )
