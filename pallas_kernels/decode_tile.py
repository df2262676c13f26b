"""How the decode kernel cuts its work for given shapes: which heads go together, how many tiles are in flight."""

from __future__ import annotations

from dataclasses import dataclass

#: Shared memory of a multiprocessor, and what of it is reserved for each program.
SHARED_MEMORY, RESERVED = 228 * 1024, 1024
#: Up to so many columns of query heads share one matrix product.
MAX_COLUMNS = 32
#: Keys and values that a multiprocessor asks for ahead of their use: four times what covers the latency of memory at
#: full speed. With more, requests wait in memory's queues and it gets slower (up to 3 % with 192 KB).
RING_BYTES = 128 * 1024
#: Scores and outputs are in registers, and so are 8-bit tiles as they are converted: with more columns than this, or
#: with pages of 8 bits, two programs need more registers than a multiprocessor has (`make compile-check` prints them).
MAX_RESIDENT_COLUMNS = 8


@dataclass(frozen=True)
class DecodeTile:
    """The shape of one program (CTA): a ring of `stages` tiles, each the keys and values of `keys` positions of one KV
    head; `programs` of them live on a multiprocessor."""

    keys: int = 64
    stages: int = 3
    programs: int = 2

    def __post_init__(self):
        if self.keys % 64 or self.keys <= 0:
            raise ValueError(f"keys={self.keys}; a tile holds a multiple of 64 keys")
        if self.stages < 2 or self.programs < 1:
            raise ValueError(f"{self}: at least 2 stages and 1 program")


def heads_per_pack(num_heads: int, num_kv_heads: int) -> int:
    """KV heads that are taken in turn so that their query heads fill columns by eights; 1 where none do."""
    group = num_heads // num_kv_heads
    for pack in (1, 2, 4, 8):
        if num_kv_heads % pack == 0 and pack * group % 8 == 0 and pack * group <= MAX_COLUMNS:
            return pack
    return 1


def columns_per_row(num_heads: int, num_kv_heads: int) -> int:
    """Query columns that a row takes in one pack's matrix product: its query heads, padded to a multiple of 8."""
    return -(-heads_per_pack(num_heads, num_kv_heads) * (num_heads // num_kv_heads) // 8) * 8


def choose_tile(columns: int, head_dim: int, itemsize: int) -> DecodeTile:
    """The tile for programs of `columns` query columns, and pages of `itemsize` bytes (`bench/tune_decode.py`).

    Large tiles in a short ring: what a tile costs beside its keys counts half, and rows are cut into fewer pieces. Two
    programs of that size where they fit, since one computes while the other waits; small tiles where no large ones do.
    """
    for keys, programs in ((128, 2), (128, 1), (64, 1)):
        stages = _stages(keys, programs, columns, head_dim, itemsize)
        if stages >= 2 and (programs == 1 or (columns <= MAX_RESIDENT_COLUMNS and itemsize > 1)):
            return DecodeTile(keys, stages, programs)
    raise ValueError(f"no tile of {columns} query columns and head_dim {head_dim} fits into shared memory")


def choose_shared_tile(columns: int, shared_columns: int, head_dim: int, itemsize: int) -> DecodeTile:
    """The tile for two phases: shared prefixes with `shared_columns`, then rows with `columns` query columns."""
    keys = 64
    beside = sum(_bytes_beside_ring(keys, n, head_dim, itemsize) for n in (columns, shared_columns))
    stages = min(RING_BYTES, SHARED_MEMORY - RESERVED - beside) // _stage_bytes(keys, head_dim, itemsize)
    most = max(1, _shared_columns(head_dim) // columns)
    if shared_columns > most * columns or stages < 2:
        raise ValueError(
            f"groups of {shared_columns // columns} rows with {columns} query columns each and head_dim {head_dim} do "
            f"not fit into a program: at most {most} rows a group"
        )
    return DecodeTile(keys, stages, 1)


def check_tile(tile: DecodeTile, columns: int, head_dim: int, itemsize: int) -> None:
    """ValueError where the tile's ring does not fit into shared memory, with the most stages that would."""
    free = SHARED_MEMORY // tile.programs - RESERVED - _bytes_beside_ring(tile.keys, columns, head_dim, itemsize)
    stages = max(0, free) // _stage_bytes(tile.keys, head_dim, itemsize)
    if tile.stages > stages:
        raise ValueError(
            f"{tile} with {columns} query columns, head_dim {head_dim} and {itemsize} byte(s) a number: shared memory "
            f"holds {stages} stages"
        )


def max_members(num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """Rows that a group of a shared prefix can have at most."""
    return max(1, _shared_columns(head_dim) // columns_per_row(num_heads, num_kv_heads))


def _shared_columns(head_dim: int) -> int:
    """Query columns of a shared prefix: scores and outputs must fit the registers of one warpgroup."""
    return 64 if head_dim <= 128 else 32


def _stages(keys: int, programs: int, columns: int, head_dim: int, itemsize: int) -> int:
    """Tiles of a ring, as many as RING_BYTES are and shared memory has room for beside the rest."""
    free = SHARED_MEMORY // programs - RESERVED - _bytes_beside_ring(keys, columns, head_dim, itemsize)
    return min(RING_BYTES // programs, free) // _stage_bytes(keys, head_dim, itemsize)


def _stage_bytes(keys: int, head_dim: int, itemsize: int) -> int:
    return 2 * keys * head_dim * itemsize


def _bytes_beside_ring(keys: int, columns: int, head_dim: int, itemsize: int) -> int:
    """Shared memory of queries (of two rows), softmax weights and outputs, and of reductions and barriers."""
    beside = 2 * (3 * columns * head_dim + columns * keys) + 4096
    if itemsize == 1:
        beside += 2 * 2 * keys * head_dim  # keys and values as 16-bit floats
    return beside
