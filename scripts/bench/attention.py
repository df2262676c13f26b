"""Attention kernels against this card's ceilings and against other implementations.

    python scripts/bench/attention.py [--quick] [--kernels decode prefill shared write copy]
    python scripts/bench/attention.py --decode 64x2048 8x8192 --heads 32/8 --head-dim 128 --page-size 16
    python scripts/bench/attention.py --decode 64x4096 --dtype float8_e4m3fn --implementations pallas cudnn
    python scripts/bench/attention.py --prefill 8192 512+16384
    python scripts/bench/attention.py --cascade 4x16@1024+96 1x64@1024+256

First the card: what a copy of a large array and a large matrix product reach. Then a table a kernel: microseconds a
call; the KV that must be read, in GB/s, as a share of the copy (for prefill TFLOP/s, as a share of the matrix product);
the largest difference to the reference. A share above 100 % is possible: pure reading can be faster than copying. What
cannot run is listed with its reason. All of it goes to a file of JSON, whose name is the last line.

A time is the median of differences between runs of one and of three lengths, of programs that hold many calls, each of
which waits for the one before; launches cancel. The calls take several pools in turn, so that KV comes from memory, not
from a cache of the device. All data is random, and pages lie all over the pool.

decode         one query token a row: ROWSxCONTEXT
prefill        causal, one row: NEW tokens, or NEW+CACHED
shared         PROMPTSxSAMPLES@PROMPT+OWN: samples of the same prompts, the prompt's pages read once for all of them,
               against a plain decode of the same rows
write          new tokens into the pools of 8 layers, microseconds a layer
copy           pages copied in all of 32 layers; a few pages stay in the device's cache
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import math
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from attention_cases import (
    CascadeCase,
    DecodeCase,
    Heads,
    PagedData,
    PrefillCase,
    calls_a_program,
    cascade_cases,
    cascade_data,
    decode_cases,
    decode_data,
    prefill_cases,
    prefill_data,
    random_normal,
    random_pools,
    uniform_decode,
)
from attention_peers import (
    Candidate,
    JaxCandidate,
    NotHere,
    decode_cudnn,
    decode_fa3,
    decode_triton,
    prefill_cudnn,
    prefill_fa3,
)
from device_timing import Card, Program, measure_card, seconds_per_call

import jaxpaged
from jaxpaged.device.cache import PagedCache
from jaxpaged.study.report_file import report_path, write_report
from pallas_kernels import checks, reference
from pallas_kernels.decode_tile import max_members

Array = jax.Array

IMPLEMENTATIONS = (
    "pallas", "pallas-invariant", "reference", "jax-triton", "cudnn", "fa3", "plain", "shared", "xla",
)  # fmt: skip
KERNELS = ("decode", "prefill", "shared", "write", "copy")
#: The reference walks over pairs of small tiles: beyond this many pairs of positions it is not worth the wait.
MAX_REFERENCE_PAIRS = 2**20
#: A larger difference to the reference than rounding explains.
WRONG = 0.05
WRITE_TOKENS, WRITE_LAYERS, WRITE_ROUNDS = (1, 64, 256, 2048), 8, 4
COPIED_PAGES, COPY_LAYERS, COPY_ROUNDS = (1, 8, 64, 256), 32, 2


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    start = time.perf_counter()
    card = measure_card(args.repeats)
    print(f"{card.device}, jax {jax.__version__}; {args.shape} unless said")
    print(f"copy of a large array (read + written) {card.copy_gb_per_s:12,.0f} GB/s")
    print(f"bf16 matrix product                    {card.matmul_tflop_per_s:12,.1f} TFLOP/s")
    report = Report(card, args.repeats, args.implementations)
    benchmarks = {
        "decode": bench_decode, "prefill": bench_prefill, "shared": bench_shared, "write": bench_write,
        "copy": bench_copy,
    }  # fmt: skip
    for kernel in args.kernels:
        report.begin(kernel)
        benchmarks[kernel](args, report)
    figures = {
        **card._asdict(),
        "jax": jax.__version__,
        "jaxpaged": jaxpaged.__version__,
        "shape": dataclasses.asdict(args.shape),
        "seconds": round(time.perf_counter() - start, 1),
        "results": report.rows,
    }
    write_report(figures, args.json, "attention")
    return 0


class Measurement(NamedTuple):
    seconds: float
    amount: float  # bytes moved, or floating-point operations
    difference: float | None = None  # the largest, to the reference
    setting: str = ""


@dataclass
class Report:
    """Prints the tables line by line, and keeps the lines."""

    card: Card
    repeats: int
    implementations: list[str] | None  # None: all
    rows: list[dict[str, Any]] = field(default_factory=list)
    kernel: str = ""

    def begin(self, kernel: str) -> None:
        self.kernel = kernel
        print(f"\n{kernel:<24} {'implementation':<17} {'us':>8} {self._unit:>8} {'share':>6} {'max diff':>9}")

    def compare(
        self,
        case: str,
        implementation: str,
        prepare: Callable[[], Sequence[Candidate]],
        calls: int,
        amount: float,
        expected: Array,
    ) -> None:
        self.add(case, implementation, lambda: fastest(prepare(), calls, amount, expected, self.repeats))

    def add(self, case: str, implementation: str, measure: Callable[[], Measurement]) -> None:
        """One line: what was measured, or why it could not be."""
        if self.implementations is not None and implementation not in self.implementations:
            return
        row: dict[str, Any] = {"kernel": self.kernel, "case": case, "implementation": implementation}
        self.rows.append(row)
        print(f"{case:<24} {implementation:<17} ", end="", flush=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # the op that JAX ships says so at every call
                row.update(self._measured(measure()))
        except NotHere as reason:
            row["reason"] = str(reason)
        except Exception as error:  # whatever it is, the other implementations are still worth measuring
            row["reason"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        print(row["reason"] if "reason" in row else self._line(row), flush=True)

    def _measured(self, measurement: Measurement) -> dict[str, Any]:
        difference = measurement.difference
        rate = measurement.amount / measurement.seconds / (1e12 if self.kernel == "prefill" else 1e9)
        ceiling = self.card.matmul_tflop_per_s if self.kernel == "prefill" else self.card.copy_gb_per_s
        return {
            "setting": measurement.setting,
            "us": round(measurement.seconds * 1e6, 2),
            self._unit: round(rate, 1),
            "share": round(rate / ceiling, 3),
            "max_difference": difference if difference is None or math.isfinite(difference) else str(difference),
            # Not `difference > WRONG`: a NaN is wrong too.
            "wrong": difference is not None and not difference <= WRONG,
        }

    def _line(self, row: dict[str, Any]) -> str:
        difference = row["max_difference"]
        shown = "" if difference is None else f"{float(difference):.1e}"
        numbers = f"{row['us']:8,.1f} {row[self._unit]:8,.0f} {row['share']:6.0%} {shown:>9}"
        return f"{numbers}  {row['setting']} {'WRONG' if row['wrong'] else ''}".rstrip()

    @property
    def _unit(self) -> str:
        return "TFLOP/s" if self.kernel == "prefill" else "GB/s"


def fastest(candidates: Sequence[Candidate], calls: int, amount: float, expected: Array, repeats: int) -> Measurement:
    measured = []
    for candidate in candidates:
        difference = _difference(candidate.output(), expected)
        seconds = seconds_per_call(candidate.program(calls), repeats)
        measured.append(Measurement(seconds, amount, difference, candidate.setting))
    return min(measured, key=lambda measurement: measurement.seconds)


def _difference(out: Array, expected: Array) -> float:
    return float(jnp.max(jnp.abs(out.astype(jnp.float32) - expected.astype(jnp.float32))))


def bench_decode(args: argparse.Namespace, report: Report) -> None:
    implementations: dict[str, Callable[[DecodeCase, PagedData], Sequence[Candidate]]] = {
        "pallas": functools.partial(_paged_decode, batch_invariant=False),
        "pallas-invariant": functools.partial(_paged_decode, batch_invariant=True),
        "reference": lambda case, data: [_decode_candidate(reference.paged_decode, case.heads, data)],
        "jax-triton": decode_triton,
        "cudnn": decode_cudnn,
        "fa3": decode_fa3,
    }
    cases = [uniform_decode(*shape, heads=args.shape) for shape in args.decode] or decode_cases(args.shape, args.quick)
    for case in cases:
        data = decode_data(case)
        expected = _decode_candidate(reference.paged_decode, case.heads, data).output()
        label, calls = case.name + case.heads.changes(args.shape), calls_a_program(case.seconds)
        for name, prepare in implementations.items():
            run = functools.partial(prepare, case, data)
            report.compare(label, name, run, calls, case.kv_bytes, expected)


def _paged_decode(case: DecodeCase, data: PagedData, *, batch_invariant: bool) -> Sequence[Candidate]:
    kernel = _own_kernel("paged_decode", "paged_decode", batch_invariant=batch_invariant)
    return [_decode_candidate(kernel, case.heads, data)]


def _decode_candidate(kernel: Callable[..., Array], heads: Heads, data: PagedData) -> Candidate:
    attend = functools.partial(kernel, scale=heads.scale)
    return JaxCandidate(attend, data.q, data.caches, (data.block_tables, data.context_lens))


def _own_kernel(module: str, name: str, **options: Any) -> Callable[..., Array]:
    """A kernel of this project, if the device runs it."""
    if missing := checks.missing_support(jax.devices()[0]):
        raise NotHere(missing)
    return functools.partial(getattr(importlib.import_module(f"pallas_kernels.{module}"), name), **options)


def bench_prefill(args: argparse.Namespace, report: Report) -> None:
    implementations: dict[str, Callable[[PrefillCase, PagedData], Sequence[Candidate]]] = {
        "pallas": _paged_prefill,
        "reference": _reference_prefill,
        "cudnn": prefill_cudnn,
        "fa3": prefill_fa3,
    }
    given = [PrefillCase(1, new, cached, args.shape) for new, cached in args.prefill]
    for case in given or prefill_cases(args.shape, args.quick):
        data = prefill_data(case)
        expected = _prefill_candidate(reference.paged_prefill, case, data).output()
        label, calls = case.name + case.heads.changes(args.shape), calls_a_program(case.seconds)
        for name, prepare in implementations.items():
            run = functools.partial(prepare, case, data)
            report.compare(label, name, run, calls, case.flops, expected)


def _paged_prefill(case: PrefillCase, data: PagedData) -> Sequence[Candidate]:
    return [_prefill_candidate(_own_kernel("paged_prefill", "paged_prefill"), case, data)]


def _reference_prefill(case: PrefillCase, data: PagedData) -> Sequence[Candidate]:
    if case.pairs > MAX_REFERENCE_PAIRS:
        raise NotHere("too slow at this size to be timed")
    return [_prefill_candidate(reference.paged_prefill, case, data)]


def _prefill_candidate(kernel: Callable[..., Array], case: PrefillCase, data: PagedData) -> Candidate:
    starts = jnp.arange(0, case.rows * case.new, case.new, jnp.int32)
    lens = jnp.full(case.rows, case.new, jnp.int32)
    attend = functools.partial(kernel, scale=case.heads.scale)
    return JaxCandidate(attend, data.q, data.caches, (data.block_tables, starts, lens, data.context_lens))


def bench_shared(args: argparse.Namespace, report: Report) -> None:
    given = [CascadeCase(*shape, heads=args.shape) for shape in args.cascade or []]
    cases = given or cascade_cases(args.shape, args.quick)
    most = args.max_members or max_members(args.shape.num_heads, args.shape.num_kv_heads, args.shape.head_dim)
    # The same functions for all cases, whose arrays have the same shapes: each is compiled once.
    oracle = functools.partial(reference.paged_decode, scale=args.shape.scale)
    plain, setting = oracle, "reference"
    if checks.missing_support(jax.devices()[0]) is None:
        plain, setting = _own_kernel("paged_decode", "paged_decode", scale=args.shape.scale), ""

    @functools.cache
    def shared() -> Callable[..., Array]:
        return _own_kernel("cascade", "cascade_decode", scale=args.shape.scale)

    for case, data, groups, alone_bytes, shared_bytes, calls in cascade_data(cases, most):
        inputs = (data.block_tables, data.context_lens)
        expected = JaxCandidate(oracle, data.q, data.caches, inputs).output()
        label = case.name + case.heads.changes(args.shape)

        def prepare_plain(data=data, inputs=inputs) -> Sequence[Candidate]:
            return [JaxCandidate(plain, data.q, data.caches, inputs, setting)]

        def prepare_shared(data=data, inputs=inputs, groups=groups) -> Sequence[Candidate]:
            return [JaxCandidate(shared(), data.q, data.caches, (*inputs, groups))]

        report.compare(label, "plain", prepare_plain, calls, alone_bytes, expected)
        report.compare(label, "shared", prepare_shared, calls, shared_bytes, expected)


def bench_write(args: argparse.Namespace, report: Report) -> None:
    for tokens in WRITE_TOKENS[1:3] if args.quick else WRITE_TOKENS:

        def measure(tokens: int = tokens) -> Measurement:
            amount = 2 * tokens * args.shape.token_bytes  # read and written, one layer
            return Measurement(seconds_per_call(_write_program(tokens, args.shape), args.repeats), amount)

        report.add(f"{tokens} tokens", "xla", measure)


def bench_copy(args: argparse.Namespace, report: Report) -> None:
    implementations = {"pallas": lambda: _own_kernel("page_copy", "copy_pages"), "xla": lambda: reference.copy_pages}
    for pages in COPIED_PAGES[1:3] if args.quick else COPIED_PAGES:
        for name, find in implementations.items():

            def measure(pages: int = pages, find: Callable[[], Callable[..., Any]] = find) -> Measurement:
                amount = 2 * pages * args.shape.page_size * args.shape.token_bytes * COPY_LAYERS
                return Measurement(seconds_per_call(_copy_program(pages, args.shape, find()), args.repeats), amount)

            report.add(f"{pages} pages", name, measure)


def _write_program(tokens: int, heads: Heads) -> Program:
    """Writes `tokens` new tokens to every layer, to other slots each round; one layer's K and V are a call."""
    cache = PagedCache(*random_pools(WRITE_LAYERS, 1 + -(-tokens // heads.page_size), heads))
    num_slots = (cache.k[0].shape[0] - 1) * heads.page_size
    rng = np.random.default_rng(0)
    slots = [heads.page_size + rng.permutation(num_slots)[:tokens] for _ in range(WRITE_ROUNDS)]
    new = [random_normal(jax.random.key(i), (tokens, *cache.k[0].shape[2:]), heads.query_dtype) for i in range(2)]

    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache: PagedCache, k: Array, v: Array, slots: Array) -> PagedCache:
        for row in slots:
            for layer in range(WRITE_LAYERS):
                cache = cache.write(layer, k, v, row)
        return cache

    rows = jnp.asarray(np.stack(slots), jnp.int32)
    return Program(lambda cache: step(cache, *new, rows), cache, WRITE_ROUNDS * WRITE_LAYERS)


def _copy_program(pages: int, heads: Heads, copy_pages: Callable[..., tuple[Array, ...]]) -> Program:
    """Copies `pages` pages in every layer, other ones each round; a round is a call."""
    k, v = random_pools(COPY_LAYERS, 1 + 2 * pages, heads)
    rng = np.random.default_rng(0)
    ids = [1 + rng.permutation(k[0].shape[0] - 1)[: 2 * pages].reshape(2, pages) for _ in range(COPY_ROUNDS)]

    @functools.partial(jax.jit, donate_argnums=0)
    def step(pools: tuple[Array, ...], ids: Array) -> tuple[Array, ...]:
        for src, dst in ids:
            pools = copy_pages(pools, src, dst)
        return pools

    copies = jnp.asarray(np.stack(ids), jnp.int32)
    return Program(lambda pools: step(pools, copies), (*k, *v), COPY_ROUNDS)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, help="default: those with shapes given, or all")
    parser.add_argument("--quick", action="store_true", help="fewer named cases")
    parser.add_argument("--decode", nargs="+", default=[], type=numbers(r"(\d+)x(\d+)"), metavar="ROWSxCONTEXT")
    parser.add_argument("--prefill", nargs="+", default=[], type=numbers(r"(\d+)(?:\+(\d+))?"), metavar="NEW[+CACHED]")
    parser.add_argument(
        "--cascade", nargs="*", type=numbers(r"(\d+)x(\d+)@(\d+)\+(\d+)"), metavar="PROMPTSxSAMPLES@PROMPT+OWN",
        help="without shapes: the named cases",
    )  # fmt: skip
    parser.add_argument("--heads", type=numbers(r"(\d+)/(\d+)"), default=(32, 8), metavar="H/K")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float8_e4m3fn"), default="bfloat16")
    parser.add_argument("--max-members", type=int, help="rows that read a shared run together (default: the most)")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, help="default: all")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=report_path, metavar="FILE", help="of all figures (default: a temporary file)")
    args = parser.parse_args(argv)
    given = {"decode": args.decode, "prefill": args.prefill, "shared": args.cascade is not None}
    args.kernels = args.kernels or [kernel for kernel in KERNELS if given.get(kernel)] or list(KERNELS)
    args.shape = Heads(*args.heads, head_dim=args.head_dim, page_size=args.page_size, dtype=args.dtype)
    return args


def numbers(pattern: str) -> Callable[[str], tuple[int, ...]]:
    """Reads the numbers of a pattern; those that are left out are 0."""

    def shape(text: str) -> tuple[int, ...]:
        match = re.fullmatch(pattern, text)
        if match is None:
            raise ValueError(text)
        return tuple(int(number or 0) for number in match.groups())

    return shape


if __name__ == "__main__":
    sys.exit(main())
