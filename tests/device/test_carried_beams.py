"""The device moves the tables of beams on as the host does."""

from __future__ import annotations

from array import array

import jax
import numpy as np
import pytest

from jaxpaged.device.beam_tables import CarriedBeams, descend, of_parents
from jaxpaged.host.pages.beam_tables import BeamTables
from jaxpaged.host.pages.block_table import BlockTable, append_slots
from jaxpaged.host.pages.page_allocator import PageAllocator
from jaxpaged.step_io import DecodeInputs

SIZE = 4


@pytest.mark.parametrize("prompt_lens", [(3, 6), (4, 8)])
def test_tables_slots_and_copies_are_those_of_the_host(prompt_lens):
    """Two searches of widths 3 and 4, with a sample before them and padding behind them; tables that become wider."""
    rng, num_rows = np.random.default_rng(0), 10
    allocator = PageAllocator(300, SIZE)
    sample = BlockTable(array("i"))
    append_slots([sample], [5], allocator)
    prompts = [BlockTable(array("i")), BlockTable(array("i"))]
    append_slots(prompts, list(prompt_lens), allocator)
    searches = [(1, BeamTables.fork(prompts[0], 3, allocator)), (4, BeamTables.fork(prompts[1], 4, allocator))]

    def table_rows(width: int) -> np.ndarray:
        rows = np.zeros((num_rows, width), np.int32)
        rows[0, : len(sample.pages)] = sample.pages
        for row, tables in searches:
            rows[row : row + tables.width, : tables.pages.shape[1]] = tables.pages
        return rows

    for _, tables in searches:
        tables.append()
    before = table_rows(4)
    step = jax.jit(descend, static_argnums=2)
    for number in range(9):
        parents = np.arange(num_rows, dtype=np.int32)
        positions, fresh = np.zeros((2, num_rows), np.int32)
        positions[0] = sample.num_slots
        append_slots([sample], [1], allocator)
        fresh[0] = sample.pages[-1] if positions[0] % SIZE == 0 else 0
        copies = []
        for row, tables in searches:
            rows = slice(row, row + tables.width)
            chosen = rng.integers(0, tables.width, tables.width)
            parents[rows], positions[rows] = row + chosen, tables.num_slots
            if number % 2:  # planned before the parents were known
                tables.append()
                fresh[rows] = tables.fresh_pages if positions[row] % SIZE == 0 else 0
                tables.descend(chosen)
            else:
                tables.descend(chosen)
                tables.append()
                fresh[rows] = tables.fresh_pages if positions[row] % SIZE == 0 else 0
            copies += tables.copies.T.tolist()
        width = 4 if number < 3 else 8
        inputs = DecodeInputs(
            np.zeros(num_rows, np.int32), positions, None, np.zeros((0, width), np.int32), positions + 1,
            fresh_pages=fresh,
        )  # fmt: skip
        moved = step(inputs, CarriedBeams(before, parents, np.zeros(num_rows, np.float32)), SIZE)
        expected = table_rows(width)
        np.testing.assert_array_equal(np.asarray(moved.block_tables)[:8], expected[:8])
        before = np.asarray(moved.block_tables)
        rows = np.arange(num_rows)
        slots = before[rows, positions // SIZE] * SIZE + positions % SIZE
        np.testing.assert_array_equal(np.asarray(moved.slot_mapping), slots)
        assert [pair for pair in np.asarray(moved.copies).T.tolist() if pair != [0, 0]] == copies


def test_whatever_is_kept_a_row_goes_with_the_beams():
    carried = CarriedBeams(np.zeros((3, 1), np.int32), np.array([2, 1, 1]), np.zeros(3, np.float32))
    kept = of_parents({"node": np.array([7, 8, 9])}, carried)
    assert np.asarray(kept["node"]).tolist() == [9, 8, 8]
