"""Swapping a group's pages out and back, or computing them again: which is quicker, at which page size?

    python scripts/bench/preemption.py [checkpoints/tiny-python] [--tokens 256 1024 ...] [--page-sizes 8 16 ... 256]
    python scripts/bench/preemption.py scripts/shapes/llama-3.1-8b --page-by-page     # on a GPU

The question of the vLLM paper's Figure 19, which moves 256 tokens of KV, or prefills 256 tokens. Weights, keys and
values are random, only config.json is read. `out` and `in` are the engine's own transfers (gather and send, send and
scatter), each until it has arrived; `recompute` is the engine's prefill step of one sequence, at the fewest tokens for
every page size, and for more tokens, where it is arithmetic that takes the time, at `--recompute-page-size` alone.
`--page-by-page` also times a transfer for each page, which is what makes swapping slow at small pages in the paper.

Medians of `--repeats`, behind a run to compile. Beside each stands its floor: the bytes at the speed of a large
transfer over the link each way, and the FLOPs of the layers' matrices at that of a large matrix product, or the bytes
of the weights at that of a copy if that takes longer. `auto` is what preemption="auto" does at this page size with full
pages. Ends with the same as JSON on one line. Takes the weights, the pages of the longest sequence twice and 2 GB of
the device; refuses what does not fit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from device_timing import Program, seconds_per_call

import jaxpaged
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.checkpoint import open_checkpoint
from jaxpaged.config import CacheConfig, EngineConfig, ModelConfig
from jaxpaged.config.choices import ATTENTIONS
from jaxpaged.device import steps, swap
from jaxpaged.device.attention import AttentionKernels, resolve_attention
from jaxpaged.device.cache import PagedCache, make_paged_cache
from jaxpaged.device.memory import device_memory
from jaxpaged.device.param_nodes import Params
from jaxpaged.device.params import param_shapes, random_params
from jaxpaged.engine.loading import resolve_dtype
from jaxpaged.engine.lowering import static_arguments
from jaxpaged.engine.preemption import flops_per_token, resolve_preemption
from jaxpaged.host.pages.block_table import num_pages_for
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.host.sequence import Sequence, SequenceGroup
from jaxpaged.host.step.batching import Buckets, make_batch, split
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.step_io import pack

#: Of KV that give way, unless told otherwise; of these, what the model has positions for.
TOKENS = (256, 512, 1024, 4096)
#: Bytes of the array whose transfer measures the link, and rows of the matrices that measure arithmetic.
LINK_BYTES = 1 << 28
MATRIX_ROWS = {"cpu": 512, "gpu": 8192}
#: Room for what is measured beside weights and pool: activations of the longest prefill, transfers, the arrays above.
SPARE_BYTES = {"cpu": 1 << 29, "gpu": 1 << 31}


class Card(NamedTuple):
    """What the device reaches at its simplest jobs: floors are bytes and FLOPs over these."""

    out_bytes_per_s: float
    in_bytes_per_s: float
    copy_bytes_per_s: float
    flops_per_s: float


class Setup(NamedTuple):
    """What all page sizes have in common."""

    model: ModelConfig
    dtype: str
    device: jax.Device
    params: Params
    card: Card


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = jax.devices()[0]
    model = open_checkpoint(args.model).config
    args.tokens = args.tokens or [tokens for tokens in TOKENS if tokens < model.max_position_embeddings]
    dtype = resolve_dtype(args.dtype, model, device)
    check(args, model, dtype, device)
    params = jax.device_put(random_params(model, dtype, seed=0, device=device), device)
    setup = Setup(model, dtype, device, params, measure_card(device, dtype, args.repeats))
    print_card(args, setup)
    results = []
    for page_size in args.page_sizes:
        for result in measure_page_size(setup, page_size, args):
            results.append(result)
            print_row(result)
    facts = {
        "card": setup.card._asdict(),
        "kv_bytes_per_token": kv_bytes(setup, 1),
        "flops_per_token": flops_per_token(model),
        "dtype": dtype,
        "device": device.device_kind,
        "jax": jax.__version__,
        "jaxpaged": jaxpaged.__version__,
    }
    print(json.dumps({**vars(args), **facts, "results": results}, allow_nan=False))
    return 0


def check(args: argparse.Namespace, model: ModelConfig, dtype: str, device: jax.Device) -> None:
    """Exit with one line that says why, before anything is allocated, if this cannot run."""
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(param_shapes(model, dtype)))
    tokens = 2 * (max(args.tokens) + max(args.page_sizes))
    pool = tokens * model.kv_bytes_per_token(jnp.dtype(dtype).itemsize)
    memory, owner = device_memory(device)
    needed = weights + pool + SPARE_BYTES.get(device.platform, SPARE_BYTES["gpu"])
    if needed > memory:
        raise SystemExit(
            f"weights, pool and temporaries take {needed / 1e9:.1f} GB, {owner} has {memory / 1e9:.1f} GB: choose a "
            "smaller model or fewer --tokens"
        )
    if max(args.tokens) >= model.max_position_embeddings or max(args.tokens) > 8192:
        raise SystemExit(
            f"--tokens {max(args.tokens)}: one prefill takes at most 8192 tokens, and this model has "
            f"{model.max_position_embeddings} positions"
        )


def measure_card(device: jax.Device, dtype: str, repeats: int) -> Card:
    size = LINK_BYTES
    array = jnp.ones(size // 4, jnp.float32, device=device)
    # A copy in place: fresh memory would cost a CPU dearly. There a transfer is a copy, too.
    out, back = (None, None) if device.platform == "cpu" else link_seconds(device, array, repeats)
    copied = seconds_per_call(Program(jax.jit(jnp.negative, donate_argnums=0), array), repeats)
    rows = MATRIX_ROWS.get(device.platform, MATRIX_ROWS["gpu"])
    a, b = (jax.random.normal(jax.random.key(i), (rows, rows), jnp.dtype(dtype)) for i in range(2))
    product = jax.jit(jnp.matmul)
    multiplied = seconds_per_call(Program(lambda _: product(a, b), None), repeats)
    return Card(size / (out or copied), size / (back or copied), 2 * size / copied, 2 * rows**3 / multiplied)


def link_seconds(device: jax.Device, array: jax.Array, repeats: int) -> tuple[float, float]:
    """Of the array's way to host memory, and of its way back."""
    host, on_device = swap.host_memory(device), jax.sharding.SingleDeviceSharding(device)
    pinned = jax.block_until_ready(jax.device_put(array, host))
    out = median_seconds(lambda: jax.device_put(array, host), repeats)
    return out, median_seconds(lambda: jax.device_put(pinned, on_device), repeats)


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Until the result has arrived; the first run, which compiles, does not count."""
    seconds = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def measure_page_size(setup: Setup, page_size: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of the table for each number of tokens."""
    pages = num_pages_for(max(args.tokens), page_size)
    cache = CacheConfig(page_size, 1 + 2 * pages, setup.dtype)
    itemsize = jnp.dtype(setup.dtype).itemsize
    way = resolve_preemption("swap", 1024.0, setup.model, page_size, itemsize, setup.device.platform)
    limits = EngineConfig(max(args.tokens) + 1, 64, 8192, preemption=way)
    buckets = Buckets.for_limits(limits, cache)
    kernels = resolve_attention(
        args.attention, setup.device, head_dim=setup.model.head_dim, page_size=page_size, dtype=setup.dtype
    )
    pool = make_paged_cache(setup.model, cache, setup.device)
    results = []
    for tokens in args.tokens:
        num_pages = num_pages_for(tokens, page_size)
        result: dict[str, Any] = {"page_size": page_size, "tokens": tokens, "pages": num_pages}
        pool = time_swap(setup, pool, split(num_pages, buckets.swaps), "", result, args)
        if args.page_by_page:
            pool = time_swap(setup, pool, [1] * num_pages, "single_", result, args)
        if tokens == min(args.tokens) or page_size == args.recompute_page_size:
            pool = time_recompute(setup, pool, tokens, cache, limits, kernels, result, args)
        result["auto"] = "swap" if num_pages * way.page_cost <= tokens else "recompute"
        results.append(result)
    return results


def time_swap(
    setup: Setup, pool: PagedCache, sizes: list[int], prefix: str, result: dict, args: argparse.Namespace
) -> PagedCache:
    """Out of pages all over the pool, and into others."""
    count, num_pages = sum(sizes), pool.k[0].shape[0]
    ids = np.random.default_rng(0).permutation(np.arange(1, num_pages, dtype=np.int32))
    taken, given = ids[:count], ids[-count:]
    host = swap.host_memory(setup.device)
    outs, ins = [], []
    for _ in range(1 + args.repeats):
        jax.block_until_ready(pool)
        began = time.perf_counter()
        fetched = swap.fetch_pages(pool, taken, sizes, host, setup.device)
        gone = time.perf_counter()
        pool = swap.restore_pages(pool, given, fetched, setup.device)
        ins.append(time.perf_counter() - gone)
        outs.append(gone - began)
    millis = {"out_ms": statistics.median(outs[1:]) * 1e3, "in_ms": statistics.median(ins[1:]) * 1e3}
    num_bytes = kv_bytes(setup, count * pool.k[0].shape[1])
    floor = (num_bytes / setup.card.out_bytes_per_s + num_bytes / setup.card.in_bytes_per_s) * 1e3
    millis |= {"swap_ms": sum(millis.values()), "swap_floor_ms": floor}
    result |= {prefix + name: round(value, 4) for name, value in millis.items()}
    result[prefix + "transfers"] = len(sizes)
    return pool


def time_recompute(
    setup: Setup,
    pool: PagedCache,
    tokens: int,
    cache: CacheConfig,
    limits: EngineConfig,
    kernels: AttentionKernels,
    result: dict[str, Any],
    args: argparse.Namespace,
) -> PagedCache:
    """The step in which the engine would prefill one sequence of so many tokens."""
    features = SamplingFeatures()
    scheduler = Scheduler(cache, limits)
    prompt = np.random.default_rng(0).integers(0, setup.model.vocab_size, tokens).tolist()
    params = SamplingParams(temperature=0, max_tokens=1)
    scheduler.add(SequenceGroup("0", None, params, 0, [Sequence(0, prompt, tokens)], tokens + 1))
    plan = scheduler.schedule()
    assert plan is not None and plan.is_prefill and plan.rows[0].count == tokens
    shape = Buckets.for_limits(limits, cache).shape_of(plan, features)
    packed, layout = pack(make_batch(plan, shape, cache, setup.model.vocab_size, features))
    static = static_arguments(setup.model, kernels, layout, features)
    carried = steps.Carried(jax.device_put(np.zeros(shape.num_rows, np.int32), setup.device))
    seconds = []
    for _ in range(1 + args.repeats):
        began = time.perf_counter()
        results, pool = steps.prefill_step(setup.params, pool, carried, jax.device_put(packed, setup.device), **static)
        np.asarray(results.columns)
        seconds.append(time.perf_counter() - began)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(setup.params.layers))
    arithmetic = tokens * flops_per_token(setup.model) / setup.card.flops_per_s
    floor = max(arithmetic, weights / setup.card.copy_bytes_per_s)
    result["recompute_ms"] = round(statistics.median(seconds[1:]) * 1e3, 4)
    result["recompute_floor_ms"] = round(floor * 1e3, 4)
    result["recompute_over_swap"] = round(result["recompute_ms"] / result["swap_ms"], 3)
    return pool


def kv_bytes(setup: Setup, tokens: int) -> int:
    return tokens * setup.model.kv_bytes_per_token(jnp.dtype(setup.dtype).itemsize)


def print_card(args: argparse.Namespace, setup: Setup) -> None:
    card = setup.card
    print(f"{args.model} in {setup.dtype} on {setup.device.device_kind}, {kv_bytes(setup, 1)} bytes of KV a token")
    print(
        f"link {card.out_bytes_per_s / 1e9:.2f} GB/s out, {card.in_bytes_per_s / 1e9:.2f} GB/s in; copy "
        f"{card.copy_bytes_per_s / 1e9:,.0f} GB/s; matrix product {card.flops_per_s / 1e12:.3f} TFLOP/s"
    )
    print(
        f"{'page size':>9} {'tokens':>7} {'pages':>6} {'out ms':>9} {'in ms':>9} {'swap ms':>9} {'floor':>8} "
        f"{'singly ms':>10} {'recompute ms':>13} {'floor':>9} {'auto':>10}",
        flush=True,
    )


def print_row(result: dict[str, Any]) -> None:
    def cell(name: str, width: int) -> str:
        return f"{result[name]:{width}.3f}" if name in result else f"{'-':>{width}}"

    print(
        f"{result['page_size']:9} {result['tokens']:7} {result['pages']:6} {cell('out_ms', 9)} {cell('in_ms', 9)} "
        f"{cell('swap_ms', 9)} {cell('swap_floor_ms', 8)} {cell('single_swap_ms', 10)} {cell('recompute_ms', 13)} "
        f"{cell('recompute_floor_ms', 9)} {result['auto']:>10}",
        flush=True,
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", nargs="?", default="checkpoints/tiny-python")
    parser.add_argument("--tokens", type=int, nargs="+", default=None, help=f"of KV that give way (default {TOKENS})")
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--recompute-page-size", type=int, default=16, help="where more tokens are recomputed, too")
    parser.add_argument("--page-by-page", action="store_true", help="also one transfer a page, as in the paper")
    parser.add_argument("--attention", choices=ATTENTIONS, default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=10)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
