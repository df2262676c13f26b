"""How a program of the prefill kernel is cut: keys of a tile, and how many tiles of each kind have a place."""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.query_tiles import QUERIES

#: Shared memory of a program, less what barriers need.
SHARED_MEMORY = 226 * 1024


@dataclass(frozen=True)
class PrefillTile:
    """How a program works: keys of one tile, and for how many tiles of each kind shared memory has a place."""

    keys: int = 128
    query_places: int = 2
    key_places: int = 2
    value_places: int = 3
    page_places: int = 0  # of fp8 pages, for keys and for values as they arrive: they are multiplied in other places

    def __post_init__(self):
        if self.keys % 64 or not 0 < self.keys <= 256:
            raise ValueError(f"keys={self.keys}; a tile holds a multiple of 64 keys, at most 256")
        if self.query_places < 1 or self.key_places < 2 or self.value_places < 2:
            raise ValueError(f"{self}: at least 1 place for queries, 2 for keys and 2 for values")
        if self.page_places < 0:
            raise ValueError(f"{self}: page_places is at least 0")


def choose_tile(head_dim: int, itemsize: int = 2) -> PrefillTile:
    """The tile for this head size and pages of `itemsize` bytes: as many places as shared memory has (more than 4 gain
    nothing)."""
    keys, query_places = (128, 2) if head_dim <= 128 else (64, 1)  # by registers, then by shared memory
    token_bytes = 2 * head_dim
    if itemsize == 1:
        query_places = 2 if head_dim < 128 else 1
        free = SHARED_MEMORY - (query_places * QUERIES + 4 * keys) * token_bytes
        return PrefillTile(keys, query_places, 2, 2, min(free // (2 * keys * head_dim), 4))
    places = (SHARED_MEMORY - query_places * QUERIES * token_bytes) // (keys * token_bytes)
    # Values are needed a step later than keys, so they wait longer.
    return PrefillTile(keys, query_places, min(places // 2, 4), min(places - places // 2, 4))


def check_tile(tile: PrefillTile, itemsize: int) -> None:
    """ValueError for a tile that is not for pages of `itemsize` bytes."""
    if (tile.page_places > 0) != (itemsize == 1):
        raise ValueError(f"{tile} with pages of {8 * itemsize} bits; page_places are at least 1 for 8 bits, else 0")
