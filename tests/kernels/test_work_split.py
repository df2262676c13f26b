"""Shares of a batch cover every key tile once, and the pieces of every row lie where the merge looks for them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.work_split import chunk_tiles, max_chunks, max_pieces, pieces_of, split_work

TILE = 64


class Setting(NamedTuple):
    """What is static; one compilation each."""

    num_rows: int = 5
    num_shares: int = 7
    page_keys: int = 16
    sliding_window: int | None = None
    skips_empty: bool = False


SETTINGS = [
    Setting(),
    Setting(num_rows=1, num_shares=40),
    Setting(num_rows=12, num_shares=2),
    Setting(num_rows=3, num_shares=132, page_keys=64),
    Setting(sliding_window=1),
    Setting(num_shares=16, sliding_window=1000, page_keys=8),
    Setting(skips_empty=True),
]
LENS = st.one_of(st.just(0), st.integers(0, 5000), st.integers(0, 80).map(lambda n: n * TILE), st.just(60_000))


@functools.partial(jax.jit, static_argnames=("setting", "batch_invariant"))
def compiled(lens, own_starts, setting, batch_invariant):
    return split_work(
        lens, num_shares=setting.num_shares, tile_keys=TILE, page_keys=setting.page_keys, own_starts=own_starts,
        sliding_window=setting.sliding_window, batch_invariant=batch_invariant, skips_empty=setting.skips_empty,
    )  # fmt: skip


def split(lens, setting, batch_invariant=False, own_starts=None):
    """As numpy arrays; own_starts of 0 are none."""
    own_starts = np.zeros(len(lens)) if own_starts is None else own_starts
    work = compiled(jnp.array(lens, jnp.int32), jnp.array(own_starts, jnp.int32), setting, batch_invariant)
    return type(work)(*(np.asarray(x) for x in work))


def pieces(work):
    """(share, row, low, high) of all parts [low, high) of rows, as the kernel goes through them."""
    for share in range(len(work.cuts) - 1):
        for row in range(work.rows[0, share], work.rows[1, share] + 1):
            start, end = work.starts[row], work.starts[row + 1]
            low, high = max(work.cuts[share], start), min(work.cuts[share + 1], end)
            yield share, row, int(low - start), int(high - start)


@st.composite
def batches(draw):
    setting = draw(st.sampled_from(SETTINGS))
    lens = draw(st.lists(LENS, min_size=setting.num_rows, max_size=setting.num_rows))
    if setting.skips_empty:
        lens.sort(key=lambda n: n == 0)  # as its caller must
    return setting, lens


@given(batches(), st.booleans())
@settings(deadline=None)
def test_shares_cover_every_tile_once_and_in_order(batch, batch_invariant):
    setting, lens = batch
    work = split(lens, setting, batch_invariant)
    expected = [(row, tile) for row in range(len(lens)) for tile in range(np.diff(work.starts)[row])]
    assert [(row, tile) for _, row, low, high in pieces(work) for tile in range(low, high)] == expected
    assert all(high > low for _, _, low, high in pieces(work))


@given(batches())
@settings(deadline=None)
def test_tiles_of_a_row_hold_exactly_what_it_reads(batch):
    """From the page where its window begins to its last position; a row of length 0 has a tile for its zeros."""
    setting, lens = batch
    work = split(lens, setting)
    for length, first, tiles in zip(lens, work.firsts, np.diff(work.starts), strict=True):
        begin = 0 if setting.sliding_window is None else max(0, length - setting.sliding_window)
        assert first % setting.page_keys == 0 and first <= begin < first + setting.page_keys
        if length:
            assert first + (tiles - 1) * TILE < length <= first + tiles * TILE
        else:
            assert tiles == (0 if setting.skips_empty else 1)


@given(batches())
@settings(deadline=None)
def test_shares_are_equal_but_for_the_last_ones(batch):
    setting, lens = batch
    work = split(lens, setting)
    sizes, total = np.diff(work.cuts), work.starts[-1]
    most = -(-total // setting.num_shares)
    full = total // most if most else 0
    assert (sizes[:full] == most).all() and sizes[full:].sum() == total - full * most and (sizes[full + 1 :] == 0).all()


def check_numbers(work, pieces_per_row, most):
    """Where the kernel writes pieces of a row is where `pieces_of` tells the merge to look, and nobody else's."""
    taken = set()
    for row, tiles in enumerate(np.diff(work.starts)):
        if tiles == 0:
            continue
        first, count = (int(x) for x in pieces_of(jnp.int32(row), work.starts, work.cuts, pieces_per_row))
        parts = [(share, low, high) for share, r, low, high in pieces(work) if r == row]
        if pieces_per_row is None:
            written = [row + share for share, _, _ in parts]
        else:
            chunk = int(chunk_tiles(jnp.int32(tiles)))
            written = [row * pieces_per_row + n // chunk for _, low, high in parts for n in range(low, high, chunk)]
        assert written == list(range(first, first + count))
        assert taken.isdisjoint(written) and max(written) < most
        taken.update(written)


@given(batches())
@settings(deadline=None, max_examples=30)
def test_every_piece_has_a_number_of_its_own(batch):
    setting, lens = batch
    work = split(lens, setting)
    check_numbers(work, None, max_pieces(len(lens), setting.num_shares, 1000, False))


@given(batches())
@settings(deadline=None, max_examples=30)
def test_every_batch_invariant_chunk_has_a_number_of_its_own(batch):
    setting, lens = batch
    longest = -(-max(lens) // TILE) or 1
    work = split(lens, setting, batch_invariant=True)
    check_numbers(work, max_chunks(longest), max_pieces(len(lens), setting.num_shares, longest, True))


@given(batches())
@settings(deadline=None)
def test_batch_invariant_cuts_lie_between_chunks_of_the_row(batch):
    setting, lens = batch
    work = split(lens, setting, batch_invariant=True)
    for _, row, low, high in pieces(work):
        tiles = int(work.starts[row + 1] - work.starts[row])
        chunk = max(8, -(-tiles // 32))
        assert low % chunk == 0 and (high % chunk == 0 or high == tiles)


def test_equal_shares_cut_where_a_neighbour_decides_but_chunks_do_not():
    def cuts_in_last_row(first_row, batch_invariant):
        work = split([first_row, 100 * TILE], Setting(num_rows=2, num_shares=3), batch_invariant)
        return [low for _, row, low, _ in pieces(work) if row == 1]

    assert cuts_in_last_row(0, False) == [0, 33, 67]
    assert cuts_in_last_row(50 * TILE, False) == [0, 50]
    assert cuts_in_last_row(0, True) == [0, 32, 64]
    assert cuts_in_last_row(50 * TILE, True) == [0, 48]


def test_own_starts_and_the_window_begin_the_row_at_a_page():
    setting = Setting(num_rows=4, num_shares=2)
    work = split([200, 200, 200, 0], setting, own_starts=[0, 16, 130, 0])
    assert work.firsts.tolist() == [0, 16, 128, 0]
    assert np.diff(work.starts).tolist() == [4, 3, 2, 1]
    windowed = split([200, 200, 200, 0], setting._replace(sliding_window=100), own_starts=[0, 16, 130, 0])
    assert windowed.firsts.tolist() == [96, 96, 128, 0]
    assert np.diff(windowed.starts).tolist() == [2, 2, 2, 1]


def test_more_shares_than_tiles_leave_shares_empty():
    work = split([TILE, 0, 1], Setting(num_rows=3, num_shares=6))
    assert work.cuts.tolist() == [0, 1, 2, 3, 3, 3, 3]
    assert [(share, row) for share, row, _, _ in pieces(work)] == [(0, 0), (1, 1), (2, 2)]


def test_rows_that_write_nothing_are_nobodys():
    work = split([TILE, 2 * TILE, 0, 0, 0], Setting(num_shares=2, skips_empty=True))
    assert list(pieces(work)) == [(0, 0, 0, 1), (0, 1, 0, 1), (1, 1, 1, 2)]
    nothing = split([0, 0, 0, 0, 0], Setting(num_shares=2, skips_empty=True))
    assert list(pieces(nothing)) == []


@pytest.mark.parametrize("tiles, chunk", [(1, 8), (8, 8), (256, 8), (257, 9), (1024, 32), (5000, 157)])
def test_a_chunk_has_8_tiles_or_a_32nd_of_the_row(tiles, chunk):
    assert int(chunk_tiles(jnp.int32(tiles))) == chunk


def test_no_shorter_row_has_more_chunks():
    tiles = np.arange(1, 4000)
    chunk = np.asarray(chunk_tiles(jnp.asarray(tiles, jnp.int32)))
    chunks = -(-tiles // chunk)
    assert (np.maximum.accumulate(chunks) <= [max_chunks(int(n)) for n in tiles]).all()
