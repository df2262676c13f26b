"""Ids that leave the host name memory of the pool: what does not is refused, with the row and the numbers."""

from __future__ import annotations

import time

import numpy as np
import pytest

from jaxpaged.config import CacheConfig
from jaxpaged.host.step.id_check import check_copies, check_ids
from jaxpaged.step_io import DecodeInputs, PrefillInputs

CACHE = CacheConfig(page_size=4, num_pages=10)


def decode_inputs(rows=3, width=5) -> DecodeInputs:
    """Every row reads as much as its table can hold, and writes the pool's last slot."""
    zeros = np.zeros(rows, np.int32)
    return DecodeInputs(zeros, zeros, zeros + 39, np.full((rows, width), 9, np.int32), zeros + 20)


def with_value(array: np.ndarray, place, value: int) -> np.ndarray:
    changed = array.copy()
    changed[place] = value
    return changed


def test_ids_at_the_edges_of_the_pool_pass():
    check_ids(decode_inputs(), CACHE)
    check_ids(decode_inputs()._replace(slot_mapping=np.zeros(3, np.int32)), CACHE)
    check_copies(np.array([[1, 9, 0], [2, 8, 0]], np.int32), CACHE)


@pytest.mark.parametrize(
    ("field", "place", "value", "message"),
    [
        ("block_tables", (2, 3), 10, "block_tables: row 2, entry 3 is 10, but the pool has 10 pages of 4 tokens"),
        ("block_tables", (1, 0), -1, "block_tables: row 1, entry 0 is -1, but the pool has 10 pages"),
        ("slot_mapping", 1, 40, "slot_mapping: row 1 is 40, but the pool has 10 pages of 4 tokens: slots 0 to 39"),
        ("slot_mapping", 0, -4, "slot_mapping: row 0 is -4"),
        ("context_lens", 2, 21, "context_lens: row 2 is 21, but a table of 5 pages of 4 tokens holds 20"),
        ("context_lens", 2, -1, "context_lens: row 2 is -1"),
    ],
)
def test_an_id_outside_the_pool_is_named(field, place, value, message):
    good = decode_inputs()
    bad = good._replace(**{field: with_value(getattr(good, field), place, value)})
    with pytest.raises(RuntimeError, match=message):
        check_ids(bad, CACHE)
    zeros = np.zeros(3, np.int32)
    packed = PrefillInputs(zeros, zeros, bad.slot_mapping, bad.block_tables, zeros, zeros, bad.context_lens, zeros)
    with pytest.raises(RuntimeError, match=message):
        check_ids(packed, CACHE)


def test_a_copy_outside_the_pool_is_named():
    with pytest.raises(RuntimeError, match="page copies: row 1, entry 0 is 10, but the pool has 10 pages"):
        check_copies(np.array([[1, 9], [10, 8]], np.int32), CACHE)


def test_the_largest_batch_is_checked_in_a_fraction_of_a_step():
    inputs = decode_inputs(rows=256, width=1024)
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        check_ids(inputs, CACHE)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 1e-3  # 0.1 ms on an idle core; tests share theirs
