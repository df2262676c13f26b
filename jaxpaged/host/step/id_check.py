"""The last look at a step's ids before they leave the host: on the device an id outside the pool raises nothing.

A kernel would read, or write, whatever lies at that address. One pass over each array, well under 0.1 ms a step.
"""

from __future__ import annotations

import numpy as np

from jaxpaged.config import CacheConfig
from jaxpaged.step_io import DecodeInputs, MixedInputs, StepInputs


def check_ids(inputs: StepInputs | MixedInputs, cache: CacheConfig) -> None:
    """RuntimeError if a table names no page of the pool, a slot is in none, or a context is longer than its table."""
    if isinstance(inputs, MixedInputs):
        check_ids(inputs.decode, cache)
        check_ids(inputs.prefill, cache)
        return
    num_slots = cache.num_pages * cache.page_size
    pool = f"the pool has {cache.num_pages} pages of {cache.page_size} tokens"
    _check("block_tables", inputs.block_tables, cache.num_pages, pool)
    if isinstance(inputs, DecodeInputs) and inputs.fresh_pages is not None:
        _check("fresh_pages", inputs.fresh_pages, cache.num_pages, pool)
    else:
        _check("slot_mapping", inputs.slot_mapping, num_slots, f"{pool}: slots 0 to {num_slots - 1}")
    width = inputs.block_tables.shape[1]
    longest = width * cache.page_size
    table = f"a table of {width} pages of {cache.page_size} tokens holds {longest}"
    _check("context_lens", inputs.context_lens, longest + 1, table)


def check_copies(copies: np.ndarray, cache: CacheConfig) -> None:
    """RuntimeError if copies i32[2, C] read or write a page that the pool does not have."""
    _check("page copies", copies, cache.num_pages, f"the pool has {cache.num_pages} pages")


def check_pages(page_ids: np.ndarray, cache: CacheConfig) -> None:
    """RuntimeError if the pool does not have one of the swapped pages i32[C]."""
    _check("swapped pages", page_ids, cache.num_pages, f"the pool has {cache.num_pages} pages")


def _check(name: str, ids: np.ndarray, end: int, why: str) -> None:
    """Every one of the int32 `ids` is in [0, end). Seen as unsigned, a negative one is above any `end`."""
    if ids.view(np.uint32).max(initial=0) < end:
        return
    place = np.unravel_index(int(ids.view(np.uint32).argmax()), ids.shape)
    position = "".join(f", entry {i}" for i in place[1:])
    raise RuntimeError(f"{name}: row {place[0]}{position} is {ids[place]}, but {why}; this is a bug of the scheduler")
