"""How long the engine's own steps take on this device: what `reproduce_paper.py --step-times` replays whole days with.

    python scripts/step_times.py scripts/shapes/opt-13b -o scripts/step_times/opt-13b-h100.json     # on a GPU
    python scripts/step_times.py checkpoints/tiny-python -o times.json --decode-rows 1 8 32 --num-pages 400

Weights, keys and values are random, only config.json is read. Every time is the wall time of `Engine.step`, the host's
part included: decide, pack, send, compute, fetch, learn. A decode step is measured in the middle of a simulated run
(simulate.py), whose scheduler the engine takes over, at several numbers of rows and of tokens that these read; medians
of `--steps`. Prefill steps likewise, over numbers of new tokens.

paged        decode and prefill, pages of 16 tokens; what is reserved in one piece is read in the same way
moves        pages that are copied, and swapped out and back
runs         a few requests at once on the engine itself, for each system: what a replay is held against
dense        decode and prefill over rows of `--max-model-len` tokens, and decode over rows of 544 (Anyscale's least);
             runs of static batches and of slots
samples      decode, six samples of each prompt; beams: six beams
page-sizes   decode over pages of other sizes

The file is written after each part, so a run that is cut short keeps what it has; a part that cannot run is listed with
its reason. The pool has twice the pages that the runs use, so that many rows have room for their context.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxpaged
from jaxpaged import LLM
from jaxpaged.compare import make_requests, measure
from jaxpaged.config import CacheConfig, EngineConfig
from jaxpaged.device import swap
from jaxpaged.engine import Engine
from jaxpaged.host.accounting import RunStats
from jaxpaged.host.batching import Buckets, StepShape, fit, split
from jaxpaged.host.features import SamplingFeatures
from jaxpaged.host.sequence import Sequence, SequenceGroup
from jaxpaged.preemption import resolve_preemption
from jaxpaged.sampling_params import SamplingParams
from jaxpaged.simulate import PAPER_POOL, Simulation
from jaxpaged.step_table import name_of, padding_of
from jaxpaged.workloads import Workload, make_workload

PARTS = ("paged", "moves", "runs", "dense", "samples", "beams", "page-sizes")
#: Requests of the runs: each takes some 15 s with OPT-13B's shapes on an H100.
RUNS = {"paged": 96, "contiguous-oracle": 48, "contiguous-max": 28, "dense-static": 14, "dense-slots": 14}
#: Steps before the clock runs: the first ones load the program and record its CUDA graph.
WARM_UP_STEPS = 3
#: Samples or beams of each prompt, and the tokens of the prompt, as Alpaca has them.
WIDTH, SHARED_PROMPT = 6, 20
#: Requests that run together in the paper's pool, with ShareGPT's lengths and with Alpaca's.
USUAL_BATCH, LARGEST_BATCH = 32, 256
#: Of the batching figure's shortest outputs: 512 tokens and 32.
SHORT_MAX_LEN = 544
#: Prompts of one prefill step at most: padded rows are next to free, but each number is another program.
PREFILL_ROWS = 64


class Measurement:
    """The table as it grows, and the model that it is of."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.began = time.perf_counter()
        self.pages_measured = 2 * (args.num_pages - 1) + 1
        self.llm = LLM(args.model, **self.options())
        self.points: list[dict[str, Any]] = []
        self.values: dict[str, Any] = {"copies": [], "swaps": [], "runs": [], "not_measured": {}}

    def options(self, **changes: Any) -> dict[str, Any]:
        args = self.args
        return {
            "dtype": args.dtype, "load_format": "dummy", "max_model_len": args.max_model_len, "page_size": 16,
            "num_pages": self.pages_measured, "max_num_seqs": args.max_num_seqs,
            "max_num_batched_tokens": args.max_num_batched_tokens, "attention": args.attention,
            "preemption": "recompute", "watermark": 0.01, "kv_cache": "paged", **changes,
        }  # fmt: skip

    @property
    def engine(self) -> Engine:
        return self.llm.engine

    def rebuild(self, decode_rows: list[int], prefill_tokens: list[int], **changes: Any) -> None:
        """An engine with other options, which pads its steps to these sizes alone."""
        options = self.options(**changes)
        self.llm.rebuild(**{name: value for name, value in options.items() if name not in ("dtype", "load_format")})
        self.restrict(decode_rows, prefill_tokens)

    def restrict(self, decode_rows: list[int], prefill_tokens: list[int]) -> None:
        engine = self.engine
        buckets = Buckets.for_limits(engine.limits, engine.cache_config)
        engine.buckets = dataclasses.replace(
            buckets, decode_rows=tuple(decode_rows), prefill_tokens=tuple(prefill_tokens),
            prefill_rows=(min(PREFILL_ROWS, engine.limits.max_num_seqs),), table_widths=buckets.table_widths[-1:],
        )  # fmt: skip
        fill_with_noise(engine)

    def say(self, text: str) -> None:
        print(f"{time.perf_counter() - self.began:7.1f} s  {text}", flush=True)

    def add_point(self, name: str, step: str, rows: int, tokens: float, seconds: float, device: float) -> None:
        point = {
            "name": name, "step": step, "rows": rows, "tokens": round(tokens),
            "seconds": round(seconds, 7), "device_seconds": round(device, 7),
        }  # fmt: skip
        self.points.append(point)
        self.say(f"{name:16} {step:8} {rows:4} rows {tokens:8,.0f} tokens {seconds * 1e3:9.3f} ms, "
                 f"device {device * 1e3:9.3f}")  # fmt: skip

    def write(self) -> None:
        engine, args = self.engine, self.args
        facts = {
            "model": Path(args.model).name, "model_shape": engine.model.to_dict(), "dtype": engine.cache_config.dtype,
            "attention": args.attention, "device": engine.device.device_kind, "jax": jax.__version__,
            "jaxpaged": jaxpaged.__version__, "command": "step_times.py " + " ".join(args.command),
            "num_pages": args.num_pages, "max_model_len": args.max_model_len, "max_num_seqs": args.max_num_seqs,
            "max_num_batched_tokens": args.max_num_batched_tokens, "steps": args.steps,
            "seconds": round(time.perf_counter() - self.began, 1),
        }  # fmt: skip
        lines = [f'"{name}": {json.dumps(value)}' for name, value in {**facts, **self.values}.items()]
        points = ",\n".join(json.dumps(point) for point in self.points)
        text = "{\n" + ",\n".join(lines) + f',\n"points": [\n{points}\n]\n}}\n'
        temporary = args.output.with_suffix(".part")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(args.output)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    measurement = Measurement(args)
    measurement.say(f"{args.model} on {jax.devices()[0].device_kind}, attention {measurement.engine.kernels.name}")
    measurement.restrict(args.decode_rows, args.prefill_tokens)
    ways: dict[str, Callable[[Measurement], None]] = {
        "paged": measure_paged, "moves": measure_moves, "runs": measure_runs, "dense": measure_dense,
        "samples": measure_samples, "beams": measure_beams, "page-sizes": measure_page_sizes,
    }  # fmt: skip
    for part in PARTS:
        if part not in args.parts:
            continue
        try:
            ways[part](measurement)
        except Exception as error:  # whatever stops one part, the others are worth their time on the device
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            measurement.values["not_measured"][part] = reason
            measurement.say(f"{part}: not measured: {reason}")
        measurement.write()
    return 0


# The parts


def measure_paged(m: Measurement) -> None:
    args, engine = m.args, m.engine
    compile_together(m, shapes(engine))
    for rows in args.decode_rows:
        for context in contexts_for(rows, engine, args.steps):
            time_decode(m, rows, context, 1)
    for tokens in args.prefill_tokens:
        time_prefill(m, tokens, longest=512)


def measure_moves(m: Measurement) -> None:
    engine = m.engine
    usable = engine.cache_config.num_usable_pages
    ids = np.random.default_rng(0).permutation(np.arange(1, usable + 1, dtype=np.int32))
    for size in engine.buckets.copies:
        if 2 * size > usable:
            break
        copies = np.stack([ids[:size], ids[-size:]])

        def copy(copies: np.ndarray = copies) -> None:
            engine.copy_pages(copies)
            jax.block_until_ready(engine.pool)

        seconds = median_seconds(copy, m.args.steps)
        m.values["copies"].append((size, round(seconds, 7)))
        m.say(f"copy of {size} pages {seconds * 1e3:.3f} ms")
    itemsize = jax.numpy.dtype(engine.cache_config.dtype).itemsize
    way = resolve_preemption("swap", 4.0, engine.model, 16, itemsize, engine.device.platform)
    sizes = Buckets.for_limits(dataclasses.replace(engine.limits, preemption=way), engine.cache_config).swaps
    host = swap.host_memory(engine.device)
    for size in (1, 16, 64):
        if 2 * size > usable:
            break
        parts, out, back = split(size, sizes), [], []
        for _ in range(1 + m.args.steps):
            began = time.perf_counter()
            fetched = swap.fetch_pages(engine.pool, ids[:size], parts, host, engine.device)
            gone = time.perf_counter()
            engine.pool = swap.restore_pages(engine.pool, ids[-size:], fetched, engine.device)
            back.append(time.perf_counter() - gone)
            out.append(gone - began)
        both = [round(statistics.median(times[1:]), 7) for times in (out, back)]
        m.values["swaps"].append((size, *both))
        m.say(f"swap of {size} pages: out {both[0] * 1e3:.3f} ms, back {both[1] * 1e3:.3f} ms")


def measure_runs(m: Measurement) -> None:
    """Each system with the pages of `--num-pages` alone, though the pool has more."""
    engine = m.engine
    compile_together(m, shapes(engine))
    before = engine.cache_config, engine.limits
    engine.cache_config = dataclasses.replace(engine.cache_config, num_pages=m.args.num_pages)
    for system in ("paged", "contiguous-oracle", "contiguous-max"):
        engine.limits = dataclasses.replace(engine.limits, kv_cache=system)
        run_requests(m, system)
    engine.cache_config, engine.limits = before
    engine.take_back_pool()


def measure_dense(m: Measurement) -> None:
    """Rows as long as the pages of `--num-pages` hold: with `--max-model-len` tokens each, and with fewer."""
    args = m.args
    prefill_tokens = sorted({*args.prefill_tokens[1::2], args.prefill_tokens[-1]})
    for max_len in (args.max_model_len, min(SHORT_MAX_LEN, args.max_model_len // 2)):
        slots = (args.num_pages - 1) // -(-max_len // 16)
        rows = 1 << (slots - 1).bit_length()
        m.rebuild([rows], prefill_tokens, kv_cache="dense-slots", num_pages=args.num_pages, max_model_len=max_len)
        is_long = max_len == args.max_model_len
        compile_together(m, shapes(m.engine) if is_long else decode_shapes(m.engine))
        longest = max_len - args.steps - WARM_UP_STEPS - 4
        for context in sorted({longest // 16, longest // 4, longest}):
            time_decode(m, slots, context, 1)
        if is_long:
            for tokens in prefill_tokens:
                time_prefill(m, tokens, longest=max_len // 2)
            if "runs" in args.parts:
                for system in ("dense-static", "dense-slots"):
                    m.engine.limits = dataclasses.replace(m.engine.limits, kv_cache=system)
                    run_requests(m, system)
        m.write()


def measure_samples(m: Measurement) -> None:
    measure_shared(m, num_samples=WIDTH, beam_width=0)


def measure_beams(m: Measurement) -> None:
    measure_shared(m, num_samples=1, beam_width=WIDTH)


def measure_shared(m: Measurement, num_samples: int, beam_width: int) -> None:
    """Few sizes of batches, and two lengths, as samples and beams of short requests have them."""
    args = m.args
    sizes = [rows for rows in args.decode_rows if rows >= WIDTH]
    sizes = sorted({sizes[len(sizes) // 2 - 1], sizes[-1]})
    m.rebuild(sizes, args.prefill_tokens[:1])
    one = np.array([SHARED_PROMPT], np.int32)
    simulation = Simulation(
        Workload(one, one, np.zeros(1)), m.engine.cache_config, m.engine.limits, num_samples, beam_width
    )
    simulation.run(max_steps=1)
    features = SamplingFeatures.of(simulation.scheduler.running, m.engine.model.vocab_size)
    compile_together(m, decode_shapes(m.engine), features)
    longest = min(30, m.args.max_model_len - SHARED_PROMPT - 4) - args.steps
    for rows in sizes:
        for generated in (WARM_UP_STEPS, longest):
            time_decode(m, rows // WIDTH, SHARED_PROMPT, generated, num_samples, beam_width)


def measure_page_sizes(m: Measurement) -> None:
    """Two sizes of batches: about what fills the paper's pool with ShareGPT's lengths, and the most that have room for
    two pages each, up to what fills it with Alpaca's."""
    args = m.args
    for page_size in args.page_sizes:
        usable = (m.pages_measured - 1) * 16 // page_size
        fitting = [rows for rows in args.decode_rows if 2 * rows <= usable and rows <= LARGEST_BATCH]
        if not fitting:
            raise ValueError(f"{usable} pages of {page_size} have no room for {args.decode_rows[0]} rows")
        wanted = [rows for rows in fitting if rows >= USUAL_BATCH] or fitting[-1:]
        sizes = sorted({wanted[0], wanted[-1]})
        m.rebuild(sizes, args.prefill_tokens[:1], page_size=page_size, num_pages=usable + 1)
        compile_together(m, decode_shapes(m.engine))
        for rows in sizes:
            for context in contexts_for(rows, m.engine, args.steps):
                time_decode(m, rows, context, 1)
        m.write()


# How each is measured


def shapes(engine: Engine) -> list[StepShape]:
    return engine.buckets.shapes()


def decode_shapes(engine: Engine) -> list[StepShape]:
    return [shape for shape in shapes(engine) if shape.num_tokens is None]


def compile_together(m: Measurement, wanted: list[StepShape], features: SamplingFeatures | None = None) -> None:
    """Compile steps, by default greedy ones, in as many threads as there are: jit finds the programs when the engine
    asks for them, since they are lowered for its own arrays."""
    engine, features = m.engine, features or SamplingFeatures()
    began = time.perf_counter()
    lowered = [program for shape in wanted for program in engine.lower_steps(shape, features)]
    lowered_at = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda one: one.compile(), lowered))
    m.say(f"{len(lowered)} programs: lowered in {lowered_at - began:.1f} s, compiled in "
          f"{time.perf_counter() - lowered_at:.1f} s")  # fmt: skip


def contexts_for(rows: int, engine: Engine, num_steps: int) -> list[int]:
    """Tokens of each row before the first step that is measured, so that all rows have room for the steps."""
    cache, ahead = engine.cache_config, num_steps + WARM_UP_STEPS + 3
    pages_each = cache.num_usable_pages // rows - 1  # one is left for each row, which admission asks for
    most = min(pages_each * cache.page_size, engine.limits.max_model_len) - ahead
    if most < 1:
        raise ValueError(
            f"{rows} rows find no room in {cache.num_usable_pages} pages of {cache.page_size}: raise --num-pages, or "
            "lower --decode-rows"
        )
    return sorted({max(1, most // 16), max(1, most // 4), max(1, most // 2), most})


def time_decode(
    m: Measurement, requests: int, prompt_len: int, generated: int, num_samples: int = 1, beam_width: int = 0
) -> None:
    """Decode steps of so many requests, each `generated` tokens behind its prompt, which a simulation has brought
    there: nothing but the measured steps runs on the device."""
    engine, args = m.engine, m.args
    output_lens = np.full(requests, generated + WARM_UP_STEPS + args.steps + 2, np.int32)
    longest = engine.limits.max_model_len - int(output_lens[0])
    prompt_lens = mixed_lens(prompt_len, requests, longest) if num_samples == 1 and not beam_width else prompt_len
    workload = Workload(np.full(requests, prompt_lens, np.int32), output_lens, np.zeros(requests))
    limits = dataclasses.replace(engine.limits, watermark=0.0)
    simulation = Simulation(workload, engine.cache_config, limits, num_samples, beam_width, one_by_one=True)
    stats = simulation.stats
    while num_generated(simulation, requests) < generated:
        simulation.run(max_steps=stats.steps + 1)
        if stats.preemptions or not simulation.scheduler.has_work:
            raise ValueError(f"{requests} requests do not run together in {engine.cache_config.num_usable_pages} pages")
    groups = simulation.scheduler.running
    is_greedy = num_samples == 1 and not beam_width
    engine.features = SamplingFeatures() if is_greedy else SamplingFeatures.of(groups, engine.model.vocab_size)
    engine.scheduler = simulation.scheduler
    engine.stats = RunStats.for_cache(engine.cache_config)
    walls, tokens, copied = [], [], 0
    device = 0.0
    for step in range(WARM_UP_STEPS + args.steps):
        if step == WARM_UP_STEPS:
            device, copied = engine.stats.seconds["device"], engine.stats.page_copies
        began = time.perf_counter()
        engine.step()
        walls.append(time.perf_counter() - began)
        tokens.append(sum(table.num_slots for table in engine.scheduler.tables))
    assert engine.stats.prefill_steps == 0 and engine.stats.preemptions == 0
    device = (engine.stats.seconds["device"] - device) / args.steps
    copied = (engine.stats.page_copies - copied) / args.steps
    engine.take_back_pool()
    engine.features = SamplingFeatures()
    kind = "beams" if beam_width else "samples" if num_samples > 1 else "greedy"
    seconds = statistics.median(walls[WARM_UP_STEPS:]) - copy_seconds(m, copied)
    rows = fit(requests * max(num_samples, beam_width, 1), engine.buckets.decode_rows)
    name = name_of(engine.limits.kv_cache, engine.cache_config.page_size, kind)
    m.add_point(name, "decode", rows, statistics.mean(tokens[WARM_UP_STEPS:]), seconds, device)


def mixed_lens(mean: int, count: int, longest: int) -> np.ndarray:
    """Prompts from half the mean to one and a half times, as far as they may be so long: batches are never of one."""
    spread = min(mean // 2, longest - mean)
    return np.random.default_rng(0).permutation(np.rint(np.linspace(mean - spread, mean + spread, count)))


def num_generated(simulation: Simulation, requests: int) -> int:
    """Tokens that every one of the requests has generated at least."""
    groups = simulation.scheduler.running
    if len(groups) < requests:
        return 0
    return min(
        group.beams[0].num_generated if group.beams else min(one.num_generated for one in group.sequences)
        for group in groups
    )


def copy_seconds(m: Measurement, num_pages: float) -> float:
    """What copies of so many pages take, which a replay adds by itself."""
    if not num_pages or not m.values["copies"]:
        return 0.0
    pages, seconds = zip(*m.values["copies"], strict=True)
    return float(np.interp(num_pages, (0, *pages), (0.0, *seconds)))


def time_prefill(m: Measurement, num_tokens: int, longest: int) -> None:
    """Prefill steps of so many tokens, in prompts of `longest` at most."""
    engine, args = m.engine, m.args
    rng = np.random.default_rng(0)
    count = -(-num_tokens // min(longest, engine.limits.max_model_len - 2))
    lens = [len(part) for part in np.array_split(np.zeros(num_tokens), count)]
    prompts = [rng.integers(0, engine.model.vocab_size, length).tolist() for length in lens]
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    walls, device = [], 0.0
    for repeat in range(WARM_UP_STEPS + args.steps):
        engine.stats = RunStats.for_cache(engine.cache_config)
        for i, prompt in enumerate(prompts):
            one = Sequence(0, list(prompt), len(prompt))
            engine.scheduler.add(SequenceGroup(str(i), None, params, 0, [one], len(prompt) + 2))
        began = time.perf_counter()
        engine.step()
        walls.append(time.perf_counter() - began)
        assert engine.stats.batch_tokens.tolist() == [num_tokens], "the prompts were not computed in one step"
        device += engine.stats.seconds["device"] if repeat >= WARM_UP_STEPS else 0.0
        engine.take_back_pool()
    name = name_of(engine.limits.kv_cache, engine.cache_config.page_size)
    seconds = statistics.median(walls[WARM_UP_STEPS:])
    m.add_point(name, "prefill", len(prompts), num_tokens, seconds, device / args.steps)


def run_requests(m: Measurement, system: str) -> None:
    """Requests at once, on the engine as users run it."""
    engine, args = m.engine, m.args
    engine.take_back_pool()  # with a scheduler of this system
    count = max(2, round(RUNS[system] * args.run_share))
    workload = make_workload(args.workload, count, seed=1, max_len=engine.limits.max_model_len)
    result = measure(m.llm, make_requests(workload, engine.model.vocab_size, seed=1), system, None)
    run = {
        "system": system, "workload": args.workload, "requests": count, "seed": 1,
        "num_pages": engine.cache_config.num_pages, "max_model_len": engine.limits.max_model_len,
        "padding": padding_of(engine.buckets), "steps": result.stats.steps, "seconds": round(result.seconds, 5),
        "device_seconds": round(result.stats.seconds["device"], 5),
        "normalized_latency": round(result.normalized_latency, 7),
        "mean_first_token_seconds": round(float(result.first_token_latencies.mean()), 5),
        "compilations": result.stats.compilations,
    }  # fmt: skip
    m.values["runs"].append(run)
    m.say(f"{system}: {count} requests in {result.seconds:.3f} s, {result.stats.steps} steps, "
          f"{result.stats.compilations} programs compiled meanwhile")  # fmt: skip


def fill_with_noise(engine: Engine) -> None:
    """Numbers as keys and values are, array by array: zeros would draw less power, and so flatter the clock."""
    leaves, treedef = jax.tree.flatten(engine.pool)
    engine.pool = jax.tree.unflatten(treedef, list(_noisy(leaves)))


def _noisy(leaves: list[jax.Array]) -> Iterator[jax.Array]:
    add_noise = jax.jit(
        lambda key, old: old + jax.random.normal(key, old.shape, old.dtype), donate_argnums=1
    )  # in place of the zeros: there is no room for a second pool
    for i, leaf in enumerate(leaves):
        yield jax.device_put(add_noise(jax.random.key(i, impl="unsafe_rbg"), leaf), leaf.sharding)


def median_seconds(work: Callable[[], None], repeats: int) -> float:
    times = []
    for _ in range(1 + repeats):  # the first one compiles
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path)
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="JSON, replaced if it is there")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help=f"(default: {' '.join(PARTS)})")
    add("--decode-rows", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256, 512])
    add("--prefill-tokens", type=int, nargs="+", default=[64, 256, 512, 1024, 2560])
    add("--page-sizes", type=int, nargs="+", default=[8, 32, 64, 128, 256], help="besides 16")
    add("--num-pages", type=int, default=PAPER_POOL.num_pages, help="of the runs, page 0 included (default 984)")
    add("--max-model-len", type=int, help="default: 2048, or the model's positions if these are fewer")
    add("--workload", default="sharegpt", metavar="NAME", help="of the runs (default sharegpt)")
    add("--run-share", type=float, default=1.0, metavar="X", help="share of the usual number of requests in runs")
    add("--attention", default="auto")
    add("--dtype", default="auto")
    add("--steps", type=int, default=8, help="of which a time is the median (default 8)")
    args = parser.parse_args(argv)
    given = list(argv) if argv is not None else sys.argv[1:]
    args.command = [Path(one).name if one in (str(args.model), str(args.output)) else one for one in given]
    try:
        _check(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return args


def _check(args: argparse.Namespace) -> None:
    from jaxpaged.checkpoint import open_checkpoint

    positions = open_checkpoint(args.model).config.max_position_embeddings
    args.max_model_len = min(2048, positions) if args.max_model_len is None else args.max_model_len
    args.decode_rows, args.prefill_tokens = sorted(set(args.decode_rows)), sorted(set(args.prefill_tokens))
    args.max_num_seqs, args.max_num_batched_tokens = args.decode_rows[-1], args.prefill_tokens[-1]
    if min(args.decode_rows[0], args.prefill_tokens[0], args.steps) < 1:
        raise ValueError("rows, tokens and steps are at least 1")
    if args.prefill_tokens[0] < 2:
        raise ValueError("a prefill step has at least 2 tokens: one of a single token is a decode step")
    if not args.output.parent.is_dir():
        raise ValueError(f"-o {args.output}: no such directory")
    EngineConfig(args.max_model_len, args.max_num_seqs, args.max_num_batched_tokens)
    CacheConfig(16, args.num_pages)


if __name__ == "__main__":
    sys.exit(main())
