"""Times the decode kernel with every tile that fits, to see what `decode_tile.choose_tile` should choose.

    python scripts/bench/tune_decode.py [--decode 64x2048 8x8192] [--heads 32/8] [--head-dim 128] [--page-size 16]

For each case a table, the fastest tile first, with the time over the fastest; `chosen` marks the rule's choice. A
file of JSON, whose name is the last line, has every time, and for each case how much slower than the fastest the choice
is. Programs are compiled side by side, then timed one after the other, as bench/attention.py times them. Needs a GPU
that runs the kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
from attention import numbers
from attention_cases import DecodeCase, Heads, PagedData, calls_a_program, decode_cases, decode_data, uniform_decode
from device_timing import Program, chained, seconds_per_call

from jaxpaged.study.report_file import report_path, write_report
from pallas_kernels import checks
from pallas_kernels.decode_tile import DecodeTile, check_tile, choose_tile, columns_per_row

#: Rows and context where the choice of a tile matters most: from a batch of one to a full one, short and long.
GRID = ((1, 2048), (1, 8192), (2, 8192), (4, 4096), (8, 2048), (16, 1024), (16, 4096), (32, 2048), (256, 512))


class Variant(NamedTuple):
    """One way to run a case."""

    name: str
    attend: Callable[..., jax.Array]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if missing := checks.missing_support(jax.devices()[0]):
        print(f"tune_decode: the kernels cannot run here: {missing}", file=sys.stderr)
        return 2
    cases = [uniform_decode(*shape, heads=args.shape) for shape in args.decode]
    if not cases:
        cases = decode_cases(args.shape, quick=False) + [uniform_decode(*shape, heads=args.shape) for shape in GRID]
    results = []
    for case in cases:
        chosen = chosen_tile(case)
        times = time_variants(case, decode_data(case), tile_variants(case), args.repeats)
        fastest = min(times.values())
        label = case.name + case.heads.changes(args.shape)
        for name, seconds in sorted(times.items(), key=lambda item: item[1]):
            mark = "chosen" if name == str(chosen) else ""
            rate, over = case.kv_bytes / seconds / 1e9, seconds / fastest - 1
            print(f"{label:<32} {name:<48} {seconds * 1e6:8.2f} us {rate:7,.0f} GB/s {over:6.1%} {mark}")
        print(flush=True)
        times_us = {name: round(seconds * 1e6, 2) for name, seconds in times.items()}
        lost = round(times[str(chosen)] / fastest - 1, 4)
        results.append({"case": label, "chosen": str(chosen), "lost": lost, "us": times_us})
    figures = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "results": results}
    write_report(figures, args.json, "tune_decode")
    return 0


def chosen_tile(case: DecodeCase) -> DecodeTile:
    heads = case.heads
    columns = columns_per_row(heads.num_heads, heads.num_kv_heads)
    return choose_tile(columns, heads.head_dim, itemsize(heads))


def itemsize(heads: Heads) -> int:
    return jax.numpy.dtype(heads.dtype).itemsize


def tile_variants(case: DecodeCase) -> list[Variant]:
    """Every tile that fits into shared memory, with 2 to 6 stages, and the chosen one."""
    heads, chosen = case.heads, chosen_tile(case)
    columns = columns_per_row(heads.num_heads, heads.num_kv_heads)
    tiles = {chosen}
    for keys, programs in ((64, 1), (64, 2), (64, 3), (128, 1), (128, 2), (256, 1)):
        for stages in range(2, 7):
            tile = DecodeTile(keys, stages, programs)
            with contextlib.suppress(ValueError):
                check_tile(tile, columns, heads.head_dim, itemsize(heads))
                tiles.add(tile)
    return [tile_variant(heads, tile) for tile in sorted(tiles, key=str)]


def tile_variant(heads: Heads, tile: DecodeTile) -> Variant:
    from pallas_kernels.paged_decode import paged_decode  # needs a newer JAX than this file

    return Variant(str(tile), functools.partial(paged_decode, scale=heads.scale, tile=tile))


def time_variants(case: DecodeCase, data: PagedData, variants: list[Variant], repeats: int) -> dict[str, float]:
    """Seconds a call of each variant."""
    calls = calls_a_program(case.seconds)
    inputs = (data.caches, data.block_tables, data.context_lens)
    lowered = [chained(variant.attend, calls).lower(data.q, *inputs) for variant in variants]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(lambda program: program.compile(), lowered))

    def program_of(run: Any) -> Program:
        return Program(lambda q: run(q, *inputs), data.q, calls)

    return {
        variant.name: seconds_per_call(program_of(run), repeats)
        for variant, run in zip(variants, compiled, strict=True)
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--decode", nargs="+", default=[], type=numbers(r"(\d+)x(\d+)"), metavar="ROWSxCONTEXT",
        help="default: the named cases of bench/attention.py and a grid of others",
    )  # fmt: skip
    parser.add_argument("--heads", type=numbers(r"(\d+)/(\d+)"), default=(32, 8), metavar="H/K")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float8_e4m3fn"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=report_path, metavar="FILE", help="of all figures (default: a temporary file)")
    args = parser.parse_args(argv)
    args.shape = Heads(*args.heads, head_dim=args.head_dim, page_size=args.page_size, dtype=args.dtype)
    return args


if __name__ == "__main__":
    sys.exit(main())
