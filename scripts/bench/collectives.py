"""What a decode step of a divided model sends from device to device, and the least that it can take: without a GPU.

    python scripts/bench/collectives.py [scripts/shapes/llama-3.1-8b] [--devices 2 8] [--rows 64 256] [--compile]
    python scripts/bench/collectives.py scripts/shapes/llama-3.1-70b --devices 8 --rows 1 64 256 --context 1024

The step is lowered for so many devices and its sums and gathers are read off: how many, and the bytes that each device
sends, (n - 1) / n of an array that is gathered, twice that of one that is summed in a ring. `--compile` also compiles
it, for as many H200 where JAX's CUDA plugin is on the path (`make compile-check` fetches it) and else for threads of
this CPU, and says how much of the pool is updated in place.

floor     weights and KV of a device over `--memory-tb`, and on top of that all that is sent over `--link-gb`, with
          `--latency-us` for each sum: an assumption until scripts/bench/parallel.py has measured it

Ends with the same as JSON on one line.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import sys
from typing import Any, NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # before JAX starts

import compile_kernels
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from step import count

from jaxpaged.checkpoint import open_checkpoint
from jaxpaged.config import CacheConfig, EngineConfig, ModelConfig
from jaxpaged.device.attention import REFERENCE, resolve_attention
from jaxpaged.device.mesh import Placement
from jaxpaged.device.params import param_shapes
from jaxpaged.engine.lowering import step_to_make
from jaxpaged.host.pages.block_table import num_pages_for
from jaxpaged.host.step.batching import StepShape
from jaxpaged.host.step.features import SamplingFeatures

HAS_CUDA_PLUGIN = importlib.util.find_spec("jax_cuda13_plugin") is not None
DTYPE = "bfloat16"
COLLECTIVE = re.compile(
    r'"stablehlo\.(all_reduce|all_gather)".*?[)>] : \(tensor<[^>]*>\) -> tensor<([^>]*)>', re.DOTALL
)
#: Of what a device holds in the end the share that it sends, by the number of devices.
SENT = {"all_reduce": lambda n: 2 * (n - 1) / n, "all_gather": lambda n: (n - 1) / n}


class Sent(NamedTuple):
    """The collectives of a step."""

    all_reduces: int
    all_gathers: int
    reduced_bytes: int  # that each device sends for sums
    gathered_bytes: int  # and for what is laid side by side


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    model = open_checkpoint(args.model).config
    print(f"{args.model} in {DTYPE}, {args.context} tokens of context, of each device")
    print(f"{'devices':>8} {'rows':>5} {'sums':>5} {'gathers':>8} {'sums MB':>8} {'gathers MB':>11} {'weights ms':>11} "
          f"{'KV ms':>7} {'sums ms':>8} {'gathers ms':>11} {'floor ms':>9} {'aliased':>8}")  # fmt: skip
    results = []
    for n in args.devices:
        for rows in args.rows:
            result = measure(model, devices(n), rows, args)
            results.append(result)
            aliased = "-" if result["aliased_share"] is None else format(result["aliased_share"], ".1%")
            print(f"{n:8} {rows:5} {result['all_reduces']:5} {result['all_gathers']:8} "
                  f"{result['reduced_bytes'] / 1e6:8.2f} {result['gathered_bytes'] / 1e6:11.2f} "
                  f"{result['weights_ms']:11.3f} {result['kv_ms']:7.3f} {result['sums_ms']:8.3f} "
                  f"{result['gathers_ms']:11.3f} {result['floor_ms']:9.3f} {aliased:>8}", flush=True)  # fmt: skip
    print(json.dumps({**vars(args), "jax": jax.__version__, "results": results}, allow_nan=False))
    return 0


def devices(n: int) -> Placement:
    """So many H200 that are not there, or threads of this machine."""
    if not HAS_CUDA_PLUGIN:
        return Placement(tuple(jax.devices("cpu")[:n]))
    compile_kernels.prepare_jax()
    del os.environ["MOSAIC_GPU_DUMP_PTXAS"]
    topology = topologies.get_topology_desc(platform="cuda", target_config=compile_kernels.H200, topology=f"1x1x{n}")
    return Placement(tuple(topology.devices))


def measure(model: ModelConfig, placement: Placement, rows: int, args: argparse.Namespace) -> dict[str, Any]:
    pages = num_pages_for(args.context, args.page_size)
    cache, shape = CacheConfig(args.page_size, 1 + rows * pages, DTYPE), StepShape(rows, pages)
    kernels = REFERENCE
    if HAS_CUDA_PLUGIN:
        kernels = resolve_attention(
            "auto", placement.device, head_dim=model.head_dim, page_size=args.page_size, dtype=DTYPE
        )
    limits = EngineConfig(args.context, rows)
    lowered = step_to_make(
        shape, model, DTYPE, cache, kernels, SamplingFeatures(is_random=True), placement, limits
    ).lower()
    shard = placement.shard(model)
    pool_bytes = cache.num_pages * cache.page_size * shard.kv_bytes_per_token(2)
    aliased = None
    if args.compile:
        memory = lowered.compile().memory_analysis()
        assert memory is not None, "the compiler gave no account of its memory"
        aliased = round(memory.alias_size_in_bytes / pool_bytes, 4)
    sent = collectives_of(lowered.as_text(), placement.size)
    return {
        "devices": placement.size, "rows": rows, **sent._asdict(), **floor(shard, sent, rows, args),
        "pool_bytes": pool_bytes, "aliased_share": aliased,
    }  # fmt: skip


def collectives_of(text: str, num_devices: int) -> Sent:
    """Of a program as it was lowered."""
    numbers, sizes = {"all_reduce": 0, "all_gather": 0}, {"all_reduce": 0.0, "all_gather": 0.0}
    for name, array in COLLECTIVE.findall(text):
        *shape, dtype = array.split("x")
        num_bytes = math.prod(map(int, shape)) * jnp.dtype({"bf16": "bfloat16", "f32": "float32"}[dtype]).itemsize
        numbers[name] += 1
        sizes[name] += num_bytes * SENT[name](num_devices)
    return Sent(*numbers.values(), *(round(size) for size in sizes.values()))


def floor(shard: ModelConfig, sent: Sent, rows: int, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds that a device's share takes at the least, one after the other."""
    params = param_shapes(shard, DTYPE)
    read = sum(leaf.size * 2 for leaf in jax.tree.leaves(params))
    if params.lm_head is not None:  # of the embedding a step reads a few rows
        read -= params.embedding.size * 2
    kv = rows * args.context * shard.kv_bytes_per_token(2)
    memory, link = args.memory_tb * 1e9, args.link_gb * 1e6  # bytes a millisecond
    parts = {
        "weights_ms": read / memory, "kv_ms": kv / memory,
        "sums_ms": sent.reduced_bytes / link + sent.all_reduces * args.latency_us / 1e3,
        "gathers_ms": sent.gathered_bytes / link + sent.all_gathers * args.latency_us / 1e3,
    }  # fmt: skip
    parts["floor_ms"] = sum(parts.values())
    return {name: round(value, 4) for name, value in parts.items()}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", nargs="?", default="scripts/shapes/llama-3.1-8b")
    parser.add_argument("--devices", type=count, nargs="+", default=[2, 8], help="8 at most")
    parser.add_argument("--rows", type=count, nargs="+", default=[64, 256])
    parser.add_argument("--context", type=count, default=540, help="tokens that each row reads, the new one included")
    parser.add_argument("--page-size", type=count, default=16)
    parser.add_argument("--compile", action="store_true", help="and look whether the pool is updated in place")
    parser.add_argument("--memory-tb", type=float, default=4.3, help="what a copy reaches on an H200, TB/s")
    parser.add_argument("--link-gb", type=float, default=450.0, help="NVLink of an H200 one way, by its data sheet")
    parser.add_argument("--latency-us", type=float, default=10.0, help="assumed, of one sum")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
