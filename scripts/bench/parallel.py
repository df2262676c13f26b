"""What a model gains and pays when it is divided among devices: the same steps and the same workload on 1 and on more.

    python scripts/bench/parallel.py [scripts/shapes/llama-3.1-8b] [--devices 1 2] [--parts steps workload tokens]
    python scripts/bench/parallel.py --xla xla_gpu_graph_min_graph_size=1 --xla A=1,B=COLLECTIVE_KERNEL_ALL_REDUCE
    python scripts/bench/parallel.py MODEL --small MODEL --dtype float32 --rows 2 --context 20 --workload 4x8+8 ...

Weights, keys and values are random, only config.json is read. The parts:

sums      one sum over all devices of hidden states of so many rows: microseconds, of many that follow one another
steps     a decode step at each of `--rows`: median milliseconds of `--repeats` times `--steps` steps that are launched
          one after the other, milliseconds until the host is free again, whether the pool is updated in place; with
          several devices once more with each of the `--xla` options; and from a profile the share of the time of
          a device's kernels that are collectives
workload  tokens a second of ROWSxPROMPT+OUTPUT tokens (`--workload`), all requests there from the start, samples
          drawn at random; the median of `--runs` runs behind one that is not counted
tokens    whether `--small`, in float32 with its own weights, chooses the same tokens on all numbers of devices

Prints tables, and the same as JSON on the last line. With two H200 and 8B shapes less than four minutes.
"""

from __future__ import annotations

import argparse
import gc
import glob
import gzip
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from step import count, decode_batch

import jaxpaged
from jaxpaged import LLM, SamplingParams
from jaxpaged.checkpoint import load_params, open_checkpoint
from jaxpaged.config import CacheConfig, ModelConfig
from jaxpaged.config.choices import DTYPES
from jaxpaged.device import steps
from jaxpaged.device.attention import AttentionKernels, resolve_attention
from jaxpaged.device.cache import PagedCache, make_paged_cache
from jaxpaged.device.memory import start_device
from jaxpaged.device.mesh import AXIS, POOL, WHOLE, Placement
from jaxpaged.engine.loading import resolve_dtype
from jaxpaged.engine.lowering import step_to_make
from jaxpaged.engine.placing import resolve_placements
from jaxpaged.host.pages.block_table import num_pages_for
from jaxpaged.host.step.batching import StepShape
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.step_io import pack

PARTS = ("sums", "steps", "workload", "tokens")
#: Sums that follow one another in one program.
SUMS = 64
WARM_UP_STEPS = 3
#: Steps of a profile.
PROFILED_STEPS = 5
#: What collectives are called among a GPU's kernels: NCCL's and XLA's own.
COLLECTIVE_NAMES = ("nccl", "allreduce", "all_reduce", "all-reduce", "allgather", "all_gather", "all-gather")
#: Requests of the part `tokens`.
SMALL_PROMPTS, SMALL_TOKENS = 8, 24


class Division(NamedTuple):
    """A model on some devices."""

    model: ModelConfig
    placement: Placement
    dtype: str
    kernels: AttentionKernels


class Step(NamedTuple):
    """A compiled decode step and its inputs."""

    rows: int
    xla: str
    program: jax.stages.Compiled
    packed: jax.Array
    cache: CacheConfig


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    began = time.perf_counter()
    device = start_device(0.9)
    placements = {n: resolve_placements(n, 1, None, device)[0] for n in args.devices}
    parts: dict[str, Callable[[argparse.Namespace, dict[int, Placement]], Any]] = {
        "sums": measure_sums, "steps": measure_steps, "workload": measure_workload, "tokens": compare_tokens,
    }  # fmt: skip
    results = {}
    for name in args.parts:
        print(f"\n{name} ({time.perf_counter() - began:.0f} s)", flush=True)
        results[name] = parts[name](args, placements)
    facts = {
        **vars(args), "device": device.device_kind, "num_devices": len(jax.devices()), "jax": jax.__version__,
        "jaxpaged": jaxpaged.__version__, "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    print(json.dumps({**facts, "results": results}, allow_nan=False))
    return 0


# Sums


def measure_sums(args: argparse.Namespace, placements: dict[int, Placement]) -> list[dict[str, Any]]:
    model = open_checkpoint(args.model).config
    results = []
    for n, placement in placements.items():
        for rows in args.rows if placement.mesh is not None else []:
            x = placement.put(np.ones((rows, model.hidden_size), jnp.bfloat16))
            add = chained_sums(placement)
            micros = statistics.median(timed(lambda add=add, x=x: add(x)) for _ in range(args.repeats)) / SUMS * 1e6
            results.append({"devices": n, "rows": rows, "bytes": x.nbytes, "us": round(micros, 2)})
            print(f"{n} devices, {rows:4} rows, {x.nbytes:9,} bytes: {micros:8.2f} us a sum", flush=True)
    return results


def chained_sums(placement: Placement) -> Callable[[jax.Array], jax.Array]:
    def add(x: jax.Array) -> jax.Array:
        for _ in range(SUMS):
            x = jax.lax.psum(x, AXIS) * jnp.asarray(1 / placement.size, x.dtype)
        return x

    mesh = placement.mesh
    assert mesh is not None
    program = jax.jit(jax.shard_map(add, mesh=mesh, in_specs=WHOLE, out_specs=WHOLE, check_vma=False))
    return program


def timed(call: Callable[[], Any]) -> float:
    jax.block_until_ready(call())
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


# Steps


def measure_steps(args: argparse.Namespace, placements: dict[int, Placement]) -> list[dict[str, Any]]:
    results = []
    print(f"{'devices':>8} {'rows':>5} {'step ms':>9} {'launch ms':>10} {'aliased':>8} {'temp MB':>8} "
          f"{'collectives':>12}  xla")  # fmt: skip
    for n, placement in placements.items():
        checkpoint = open_checkpoint(args.model)
        model = checkpoint.config
        dtype = resolve_dtype(args.dtype, model, placement.device)
        kernels = resolve_attention(
            "auto", placement.device, head_dim=model.head_dim, page_size=args.page_size, dtype=dtype
        )
        division = Division(model, placement, dtype, kernels)
        compiled = compile_steps(division, args)
        params = load_params(checkpoint, dtype=dtype, device=placement, load_format="dummy")
        for step in compiled:
            result = {"devices": n, "rows": step.rows, "xla": step.xla, **measure_step(division, params, step, args)}
            results.append(result)
            share = result["collectives_share"]
            print(f"{n:8} {step.rows:5} {result['ms']:9.3f} {result['launch_ms']:10.3f} {result['aliased_share']:8.1%} "
                  f"{result['temporary_bytes'] / 1e6:8.1f} {'-' if share is None else format(share, '.1%'):>12}  "
                  f"{step.xla or '-'}", flush=True)  # fmt: skip
        del params
        gc.collect()
    return results


def compile_steps(division: Division, args: argparse.Namespace) -> list[Step]:
    """All of them, in threads: what is lowered once is compiled with each of the options."""
    variants = ["", *(args.xla if division.placement.size > 1 else [])]
    pages = num_pages_for(args.context, args.page_size)
    found = []
    with ThreadPoolExecutor(16) as threads:
        for rows in sorted({max(rows, division.kernels.min_rows) for rows in args.rows}):
            shape, cache = StepShape(rows, pages), CacheConfig(args.page_size, 1 + rows * pages, division.dtype)
            features = SamplingFeatures(is_random=args.temperature > 0)
            lowered = step_to_make(
                shape, division.model, division.dtype, cache, division.kernels, features, division.placement
            ).lower()
            packed, _ = pack(decode_batch(shape, args))
            packed = division.placement.put(packed)
            for xla in variants:
                program = threads.submit(lowered.compile, compiler_options=options_of(xla))
                found.append((rows, xla, program, packed, cache))
        return [Step(rows, xla, program.result(), packed, cache) for rows, xla, program, packed, cache in found]


def options_of(xla: str) -> dict[str, Any]:
    """ "name=value,name=value" as jax takes it."""
    pairs = [part.partition("=") for part in xla.split(",") if part]
    words: dict[str, Any] = {"true": True, "false": False}
    return {name: words.get(value.lower(), int(value) if value.isdigit() else value) for name, _, value in pairs}


def measure_step(division: Division, params: Any, step: Step, args: argparse.Namespace) -> dict[str, Any]:
    pool = random_pool(division, step.cache)
    pool_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(pool)) // division.placement.size
    memory = step.program.memory_analysis()
    assert memory is not None, "the compiler gave no account of its memory"
    carried = steps.Carried(division.placement.put(np.zeros(max(256, step.rows), np.int32)))
    launched, taken, pool, carried = run_steps(params, step, pool, carried, WARM_UP_STEPS)
    launches, times = [], []
    for _ in range(args.repeats):
        launched, taken, pool, carried = run_steps(params, step, pool, carried, args.steps)
        launches.append(launched * 1e3)
        times.append(taken * 1e3)
    with profiled() as kernels:
        run_steps(params, step, pool, carried, PROFILED_STEPS)
    total = sum(kernels.values())
    collectives = sum(micros for name, micros in kernels.items() if is_collective(name))
    return {
        "ms": round(statistics.median(times), 4), "launch_ms": round(statistics.median(launches), 4),
        "pool_bytes": pool_bytes, "aliased_bytes": memory.alias_size_in_bytes,
        "aliased_share": round(memory.alias_size_in_bytes / pool_bytes, 4),
        "temporary_bytes": memory.temp_size_in_bytes,
        "collectives_share": round(collectives / total, 4) if total else None,
        "collectives_ms": round(collectives / PROFILED_STEPS / 1e3, 4),
        "kernels_ms": round(total / PROFILED_STEPS / 1e3, 4),
        "kernels": {name: round(micros / PROFILED_STEPS, 1) for name, micros in list(kernels.items())[:6]},
    }  # fmt: skip


def is_collective(name: str) -> bool:
    return any(word in name.lower() for word in COLLECTIVE_NAMES)


def random_pool(division: Division, cache: CacheConfig) -> PagedCache:
    """Numbers as keys and values are: zeros would draw less power, and so flatter the clock."""
    placement = division.placement
    leaves, treedef = jax.tree.flatten(jax.eval_shape(lambda: make_paged_cache(placement.shard(division.model), cache)))
    normal = jax.jit(jax.random.normal, static_argnums=(1, 2), out_shardings=placement.lay(POOL))
    keys = [placement.put(jax.random.key(i, impl="unsafe_rbg")) for i in range(len(leaves))]
    return jax.tree.unflatten(treedef, [normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)])


def run_steps(
    params: Any, step: Step, pool: PagedCache, carried: steps.Carried, number: int
) -> tuple[float, float, PagedCache, steps.Carried]:
    """Seconds a step until the host is free, seconds a step until all are done, and what the last one left."""
    jax.block_until_ready((params, pool))
    began = time.perf_counter()
    for _ in range(number):
        results, pool = step.program(params, pool, None, carried, step.packed)
        carried = results.carried
    launched = time.perf_counter() - began
    jax.block_until_ready((carried, pool))
    return launched / number, (time.perf_counter() - began) / number, pool, carried


@contextmanager
def profiled() -> Iterator[dict[str, float]]:
    """Microseconds of each of the first GPU's kernels in the block, the longest first; none where there is no GPU."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            yield found
        (path,) = glob.glob(f"{folder}/plugins/profile/*/perfetto_trace.json.gz")
        with gzip.open(path) as stream:
            events = json.load(stream)["traceEvents"]
    names = {(e["pid"], e["name"]): e["args"]["name"] for e in events if e.get("name") == "process_name"}
    streams = {
        (e["pid"], e["tid"]) for e in events
        if e.get("name") == "thread_name" and "Stream" in e["args"]["name"]
        and "GPU:0" in names.get((e["pid"], "process_name"), "")
    }  # fmt: skip
    micros: dict[str, float] = {}
    for event in events:
        if "dur" in event and (event["pid"], event["tid"]) in streams:
            micros[event["name"]] = micros.get(event["name"], 0.0) + event["dur"]
    found.update(sorted(micros.items(), key=lambda item: -item[1]))


# Whole runs


def measure_workload(args: argparse.Namespace, placements: dict[int, Placement]) -> list[dict[str, Any]]:
    num_requests, prompt_len, output_len = args.workload
    rng = np.random.default_rng(0)
    vocab_size = open_checkpoint(args.model).config.vocab_size
    prompts = rng.integers(0, vocab_size, (num_requests, prompt_len)).tolist()
    params = SamplingParams(max_tokens=output_len, ignore_eos=True, detokenize=False)
    results = []
    for n in placements:
        llm = LLM(
            args.model, load_format="dummy", dtype=args.dtype, tensor_parallel_size=n, max_num_seqs=num_requests,
            max_model_len=prompt_len + output_len, page_size=args.page_size, prefix_caching=False,
        )  # fmt: skip
        use_few_programs(llm)
        warm_up = llm.warm_up(params, progress=False)
        seconds = []
        for _ in range(1 + args.runs):
            began = time.perf_counter()
            llm.generate(prompts, params, progress=False)
            seconds.append(time.perf_counter() - began)
        median = statistics.median(seconds[1:])
        split = {name: round(value, 3) for name, value in llm.last_run.seconds.items()}
        results.append({
            "devices": n, "tokens_per_second": round(num_requests * output_len / median, 1),
            "seconds": round(median, 3), "warm_up_seconds": round(warm_up.seconds, 1), "steps": llm.last_run.steps,
            "split": split, "pages": llm.engine.cache_config.num_pages,
        })  # fmt: skip
        print(f"{n} devices: {results[-1]['tokens_per_second']:10,.0f} tokens/s, {median:.3f} s, {split}", flush=True)
        del llm
        gc.collect()
    return results


def use_few_programs(llm: LLM) -> None:
    """Steps padded to the largest sizes alone, which are those of this workload but for its first and last ones."""
    runner = llm.engine.runner
    lists = ("decode_rows", "prefill_rows", "prefill_tokens", "mixed_rows", "mixed_tokens", "table_widths")
    runner.buckets = replace(runner.buckets, **{name: getattr(runner.buckets, name)[-1:] for name in lists})


def compare_tokens(args: argparse.Namespace, placements: dict[int, Placement]) -> dict[str, Any]:
    model = open_checkpoint(args.small).config
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, model.vocab_size, rng.integers(2, 24)).tolist() for _ in range(SMALL_PROMPTS)]
    options = {"max_tokens": SMALL_TOKENS, "ignore_eos": True, "detokenize": False}
    params = [SamplingParams(temperature=i % 2, seed=i, **options) for i in range(SMALL_PROMPTS)]
    tokens = {}
    for n in placements:
        llm = LLM(args.small, dtype="float32", tensor_parallel_size=n, max_num_seqs=16, num_pages=256,
                  max_model_len=128, max_num_batched_tokens=64)  # fmt: skip
        use_few_programs(llm)
        tokens[n] = [output.outputs[0].token_ids for output in llm.generate(prompts, params, progress=False)]
        del llm
        gc.collect()
    first = next(iter(tokens.values()))
    different = {n: sum(a != b for a, b in zip(first, found, strict=True)) for n, found in tokens.items()}
    print(f"requests of {SMALL_PROMPTS} with other tokens than on {next(iter(tokens))}: {different}", flush=True)
    return {"requests": SMALL_PROMPTS, "different": {str(n): number for n, number in different.items()}}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", nargs="?", default="scripts/shapes/llama-3.1-8b")
    parser.add_argument("--devices", type=count, nargs="+", default=[1, 2])
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--rows", type=count, nargs="+", default=[1, 64, 256], help="padded as the engine pads")
    parser.add_argument("--context", type=count, default=540, help="tokens that each row reads, the new one included")
    parser.add_argument("--page-size", type=count, default=16)
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--xla", action="append", default=[], metavar="NAME=VALUE,...", help="try these options, too")
    parser.add_argument("--steps", type=count, default=50, help="launched one after the other for one time")
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument("--workload", type=lengths, default=(256, 128, 512), metavar="ROWSxPROMPT+OUTPUT")
    parser.add_argument("--runs", type=count, default=2)
    parser.add_argument("--small", default="checkpoints/tiny-python", help="the model of the part tokens")
    return parser.parse_args(argv)


def lengths(text: str) -> tuple[int, int, int]:
    rows, _, rest = text.partition("x")
    prompt, _, output = rest.partition("+")
    return count(rows), count(prompt), count(output)


if __name__ == "__main__":
    sys.exit(main())
