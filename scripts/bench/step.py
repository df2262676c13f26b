"""How long one decode step takes on this device, and how far that is from what its bytes allow.

    python scripts/bench/step.py [scripts/shapes/llama-3.1-8b] [--rows 8 64 256] [--context 540] [--attention auto] ...
    python scripts/bench/step.py checkpoints/tiny-python --rows 1 4 --context 40 --steps 3 --repeats 2

Weights, keys and values are random, only config.json is read. First the card: bytes of weights and KV that a step must
read, and how long that takes at the bandwidth of copying, measured here. Then each step: `--steps` of them are launched
one after the other, each on the pool that the one before it returned, and nothing is read back until the last has
ended; the time of all by their number, the median of `--repeats`. Where `launch` (until the host is free again) is as
long as the step, the host sets the pace. The context stays as long as it is. Ends with the same as JSON on one line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxpaged
from jaxpaged.checkpoint import open_checkpoint
from jaxpaged.config import CacheConfig, EngineOptions, ModelConfig
from jaxpaged.config.choices import ATTENTIONS, DTYPES
from jaxpaged.device import steps
from jaxpaged.device.attention import AttentionKernels, resolve_attention
from jaxpaged.device.cache import PagedCache, make_paged_cache
from jaxpaged.device.param_nodes import Params
from jaxpaged.device.params import random_params
from jaxpaged.engine.loading import resolve_dtype
from jaxpaged.engine.lowering import static_arguments, step_to_make
from jaxpaged.host.pages.block_table import num_pages_for
from jaxpaged.host.step.batching import StepShape
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.step_io import DecodeBatch, DecodeInputs, SamplingInputs, pack

#: Bytes of the array whose copy measures the bandwidth: many times the caches of each kind of device.
COPY_BYTES = {"cpu": 1 << 28, "gpu": 1 << 31}
COPIES = 8
#: Launches before the clock runs: the first ones load the program and record its CUDA graph.
WARM_UP_STEPS = 3


class Setup(NamedTuple):
    """What all rows of the table have in common."""

    model: ModelConfig
    dtype: str
    kernels: AttentionKernels
    device: jax.Device
    params: Params
    bandwidth: float  # bytes a second, read and written


class Step(NamedTuple):
    """A decode step that can be launched again and again."""

    carried: steps.Carried
    packed: jax.Array
    static: dict[str, Any]
    compiled: dict[str, float]  # what compiling it took and gave


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    setup = prepare(args)
    weights = weight_bytes_read(setup)
    floors = {rows: (weights + kv_bytes_read(setup, rows, args.context)) / setup.bandwidth * 1e3 for rows in args.rows}
    print_card(args, setup, weights, floors)
    print(
        f"{'rows':>6} {'step ms':>9} {'of floor':>9} {'launch ms':>10} {'tokens/s':>10} "
        f"{'compile s':>10} {'temp MB':>9} {'of pool':>8} {'aliased':>8}"
    )
    results = []
    for rows in args.rows:
        result = measure(setup, rows, args)
        result["floor_ms"] = round(floors[rows], 4)
        result["share_of_floor"] = round(floors[rows] / result["ms"], 4)
        results.append(result)
        print(
            f"{rows:6} {result['ms']:9.3f} {result['share_of_floor']:9.1%} {result['launch_ms']:10.3f} "
            f"{result['tokens_per_second']:10,.0f} {result['compile_seconds']:10.2f} "
            f"{result['temporary_bytes'] / 1e6:9.1f} {result['temporaries_of_pool']:8.2%} "
            f"{result['aliased_bytes'] / result['pool_bytes']:8.1%}",
            flush=True,
        )
    card = {
        "weight_bytes": weights,
        "copy_gb_per_second": round(setup.bandwidth / 1e9, 1),
        "attention": setup.kernels.name,
        "dtype": setup.dtype,
        "device": setup.device.device_kind,
        "jax": jax.__version__,
        "jaxpaged": jaxpaged.__version__,
    }
    print(json.dumps({**vars(args), **card, "results": results}, allow_nan=False))
    return 0


def prepare(args: argparse.Namespace) -> Setup:
    device = jax.devices()[0]
    model = open_checkpoint(args.model).config
    dtype = resolve_dtype(args.dtype, model, device)
    kernels = resolve_attention(args.attention, device, head_dim=model.head_dim, page_size=args.page_size, dtype=dtype)
    bandwidth = copy_bandwidth(device, args.repeats)
    params = jax.device_put(random_params(model, dtype, seed=0, device=device), device)
    return Setup(model, dtype, kernels, device, params, bandwidth)


def print_card(args: argparse.Namespace, setup: Setup, weights: int, floors: dict[int, float]) -> None:
    print(f"{args.model} in {setup.dtype} on {setup.device.device_kind}, attention {setup.kernels.name}")
    print(f"context {args.context}, pages of {args.page_size} tokens, copy bandwidth {setup.bandwidth / 1e9:,.0f} GB/s")
    print(f"weights read by a step: {weights / 1e9:.3f} GB")
    for rows, floor in floors.items():
        print(f"{rows:6} rows: KV {kv_bytes_read(setup, rows, args.context) / 1e9:8.3f} GB, floor {floor:8.3f} ms")
    print(flush=True)


def weight_bytes_read(setup: Setup) -> int:
    """All weights, without the tables of which a step reads a few rows."""
    read = dataclasses.replace(setup.params, position_embedding=None)
    if not setup.model.tie_word_embeddings:
        read = dataclasses.replace(read, embedding=None)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(read))


def kv_bytes_read(setup: Setup, rows: int, context: int) -> int:
    """Keys and values that the rows' queries may see, over all layers."""
    model = setup.model
    windows = (model.attention_options(layer).sliding_window or context for layer in range(model.num_layers))
    tokens = sum(min(window, context) for window in windows)
    return rows * tokens * model.kv_bytes_per_token(jnp.dtype(setup.dtype).itemsize) // model.num_layers


def copy_bandwidth(device: jax.Device, repeats: int) -> float:
    """Bytes a second of reading a large array and writing it again, in place: fresh memory would cost a CPU dearly."""
    num_bytes = COPY_BYTES.get(device.platform, COPY_BYTES["gpu"])
    array = jnp.ones(num_bytes // 4, jnp.float32, device=device)
    negate = jax.jit(jnp.negative, donate_argnums=0)
    seconds = []
    for _ in range(1 + repeats):  # the first one compiles
        began = time.perf_counter()
        for _ in range(COPIES):
            array = negate(array)
        jax.block_until_ready(array)
        seconds.append(time.perf_counter() - began)
    return 2 * num_bytes * COPIES / statistics.median(seconds[1:])


def measure(setup: Setup, rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """Compile the step for so many rows, warm it up, time it."""
    pages_per_row = num_pages_for(args.context, args.page_size)
    cache = CacheConfig(args.page_size, 1 + rows * pages_per_row, setup.dtype)
    step = build_step(setup, StepShape(rows, pages_per_row), cache, args)
    pool = random_pool(setup, cache)
    pool_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(pool))
    _, _, pool = run_steps(setup, step, pool, WARM_UP_STEPS)
    launches, times = [], []
    for _ in range(args.repeats):
        launch, seconds, pool = run_steps(setup, step, pool, args.steps)
        launches.append(launch * 1e3)
        times.append(seconds * 1e3)
    millis = statistics.median(times)
    return {
        "rows": rows,
        "ms": round(millis, 4),
        "launch_ms": round(statistics.median(launches), 4),
        "tokens_per_second": round(rows / millis * 1e3, 1),
        "kv_bytes": kv_bytes_read(setup, rows, args.context),
        "pool_bytes": pool_bytes,
        "temporaries_of_pool": round(step.compiled["temporary_bytes"] / pool_bytes, 5),
        **step.compiled,
    }


def build_step(setup: Setup, shape: StepShape, cache: CacheConfig, args: argparse.Namespace) -> Step:
    packed, layout = pack(decode_batch(shape, args))
    features = SamplingFeatures(is_random=args.temperature > 0)
    began = time.perf_counter()
    sharding = jax.sharding.SingleDeviceSharding(setup.device)
    program = step_to_make(shape, setup.model, setup.dtype, cache, setup.kernels, features, sharding)
    memory = program.compile().memory_analysis()  # and calling the step finds it
    assert memory is not None, "the compiler gave no account of its memory"
    compiled = {
        "compile_seconds": round(time.perf_counter() - began, 3),
        "temporary_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
    }
    static = static_arguments(setup.model, setup.kernels, layout, features)
    tokens = np.zeros(max(EngineOptions.max_num_seqs, shape.num_rows), np.int32)  # as `step_to_make` has it
    tokens, packed = jax.device_put((tokens, packed), setup.device)
    return Step(steps.Carried(tokens), packed, static, compiled)


def decode_batch(shape: StepShape, args: argparse.Namespace) -> DecodeBatch:
    """Every row at the last position of its context, over pages in random order."""
    rows, width = shape.num_rows, shape.table_width
    rng = np.random.default_rng(0)
    tables = 1 + rng.permutation(rows * width).astype(np.int32).reshape(rows, width)
    last = np.full(rows, args.context - 1, np.int32)
    slots = tables[:, -1] * args.page_size + last % args.page_size
    ids = np.arange(rows, dtype=np.int32)
    inputs = DecodeInputs(ids, last, slots, tables, last + 1)
    sampling = SamplingInputs(np.zeros((rows, 2), np.int32), ids, last + 1)
    if args.temperature > 0:
        sampling = sampling._replace(temperatures=np.full(rows, args.temperature, np.float32))
    return DecodeBatch(inputs, sampling)


def random_pool(setup: Setup, cache: CacheConfig) -> PagedCache:
    """Numbers as keys and values are: zeros would draw less power, and so flatter the clock."""
    leaves, treedef = jax.tree.flatten(jax.eval_shape(lambda: make_paged_cache(setup.model, cache)))
    normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
    keys = [jax.random.key(i, impl="unsafe_rbg") for i in range(len(leaves))]
    arrays = [normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.device_put(jax.tree.unflatten(treedef, arrays), setup.device)


def run_steps(setup: Setup, step: Step, pool: PagedCache, count: int) -> tuple[float, float, PagedCache]:
    """Seconds a step until the host is free, seconds a step until all are done, and the pool."""
    jax.block_until_ready(pool)
    parts, carried = steps.decode_parts(setup.params, setup.model, is_async=True), step.carried
    began = time.perf_counter()
    for _ in range(count):
        results, pool = steps.decode_step(parts, pool, carried, step.packed, **step.static)
        carried = results.carried
    launched = time.perf_counter() - began
    jax.block_until_ready((carried, pool))
    return launched / count, (time.perf_counter() - began) / count, pool


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", nargs="?", default="scripts/shapes/llama-3.1-8b")
    parser.add_argument("--rows", type=count, nargs="+", default=[8, 64, 256], help="on a GPU the engine pads to 8")
    parser.add_argument("--context", type=count, default=540, help="tokens that each row reads, the new one included")
    parser.add_argument("--attention", choices=ATTENTIONS, default="auto")
    parser.add_argument("--page-size", type=count, default=16)
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--steps", type=count, default=50, help="launched one after the other for one time")
    parser.add_argument("--repeats", type=count, default=5)
    return parser.parse_args(argv)


def count(text: str) -> int:
    """Of at least 1, or argparse says that it is none."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    sys.exit(main())
