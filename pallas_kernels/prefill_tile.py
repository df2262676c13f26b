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

    def __post_init__(self):
        if self.keys % 64 or not 0 < self.keys <= 256:
            raise ValueError(f"keys={self.keys}; a tile holds a multiple of 64 keys, at most 256")
        if self.query_places < 1 or self.key_places < 2 or self.value_places < 2:
            raise ValueError(f"{self}: at least 1 place for queries, 2 for keys and 2 for values")


def choose_tile(head_dim: int) -> PrefillTile:
    """The tile for this head size: as many places as shared memory has (more than 4 gain nothing)."""
    keys, query_places = (128, 2) if head_dim <= 128 else (64, 1)  # by registers, then by shared memory
    token_bytes = 2 * head_dim
    places = (SHARED_MEMORY - query_places * QUERIES * token_bytes) // (keys * token_bytes)
    # Values are needed a step later than keys, so they wait longer.
    return PrefillTile(keys, query_places, min(places // 2, 4), min(places - places // 2, 4))
