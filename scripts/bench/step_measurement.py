"""How step_times.py measures one thing: a decode step, a prefill step, a run; and the table that grows meanwhile."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxpaged
from jaxpaged import LLM
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.config.options import FIXED_OPTIONS, EngineOptions
from jaxpaged.engine.engine import Engine
from jaxpaged.host.sequence import Sequence, SequenceGroup
from jaxpaged.host.step.batching import Buckets, StepShape, fit
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.study.compare import make_requests, measure
from jaxpaged.study.simulate import Simulation
from jaxpaged.study.step_table import name_of, padding_of
from jaxpaged.study.workloads import Workload, make_workload

#: Requests of the runs: each takes some 15 s with OPT-13B's shapes on an H100.
RUNS = {"paged": 96, "contiguous-oracle": 48, "contiguous-max": 28, "dense-static": 14, "dense": 14}
#: Steps before the clock runs: the first ones load the program and record its CUDA graph.
WARM_UP_STEPS = 3
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
            "preemption": "recompute", "watermark": EngineOptions.watermark, "kv_cache": EngineOptions.kv_cache,
            "mixed_steps": False,  # a table has none: their times follow from those of the others
            "prefix_caching": False,  # the same prompts come again and again, and are to be computed
            **changes,
        }  # fmt: skip

    @property
    def engine(self) -> Engine:
        return self.llm.engine

    def rebuild(self, decode_rows: list[int], prefill_tokens: list[int], **changes: Any) -> None:
        """An engine with other options, which pads its steps to these sizes alone."""
        options = self.options(**changes)
        self.llm.rebuild(**{name: value for name, value in options.items() if name not in FIXED_OPTIONS})
        self.restrict(decode_rows, prefill_tokens)

    def restrict(self, decode_rows: list[int], prefill_tokens: list[int]) -> None:
        engine = self.engine
        buckets = Buckets.for_limits(engine.limits, engine.cache_config)
        engine.runner.buckets = dataclasses.replace(
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
            "model": Path(args.model).name, "model_shape": engine.model.to_dict(), "dtype": engine.dtype,
            "attention": args.attention, "device": engine.device.device_kind, "jax": jax.__version__,
            "jaxpaged": jaxpaged.__version__, "command": "step_times.py " + " ".join(args.command),
            "num_pages": args.num_pages, "max_model_len": args.max_model_len, "max_num_seqs": args.max_num_seqs,
            "max_num_batched_tokens": args.max_num_batched_tokens, "steps": args.steps,
            "seconds": round(time.perf_counter() - self.began, 1),
        }  # fmt: skip
        lines = [f'"{name}": {json.dumps(value, allow_nan=False)}' for name, value in {**facts, **self.values}.items()]
        points = ",\n".join(json.dumps(point, allow_nan=False) for point in self.points)
        text = "{\n" + ",\n".join(lines) + f',\n"points": [\n{points}\n]\n}}\n'
        temporary = args.output.with_suffix(".part")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(args.output)


def shapes(engine: Engine) -> list[StepShape]:
    return engine.runner.buckets.shapes()


def decode_shapes(engine: Engine) -> list[StepShape]:
    return [shape for shape in shapes(engine) if shape.num_tokens is None]


def compile_together(m: Measurement, wanted: list[StepShape], features: SamplingFeatures | None = None) -> None:
    """Compile steps, by default greedy ones, in as many threads as there are: jit finds the programs when the engine
    asks for them, since they are lowered for its own arrays."""
    engine, features = m.engine, features or SamplingFeatures()
    began = time.perf_counter()
    lowered = [program for shape in wanted for program in engine.programs(shape, features)]
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
    is_greedy = num_samples == 1 and not beam_width
    groups = [] if is_greedy else simulation.scheduler.running
    walls, tokens, copied = [], [], 0
    device = 0.0
    with engine.step_by_hand(SamplingFeatures.of(groups, engine.model.vocab_size), simulation.scheduler) as loop:
        stats = loop.record.stats
        for step in range(WARM_UP_STEPS + args.steps):
            if step == WARM_UP_STEPS:
                device, copied = stats.seconds["device"], stats.page_copies
            began = time.perf_counter()
            loop.step()
            walls.append(time.perf_counter() - began)
            tokens.append(sum(table.num_slots for table in loop.scheduler.tables))
    assert stats.prefill_steps == 0 and stats.preemptions == 0
    device = (stats.seconds["device"] - device) / args.steps
    copied = (stats.page_copies - copied) / args.steps
    kind = "beams" if beam_width else "samples" if num_samples > 1 else "greedy"
    seconds = statistics.median(walls[WARM_UP_STEPS:]) - copy_seconds(m, copied)
    rows = fit(requests * max(num_samples, beam_width, 1), engine.runner.buckets.decode_rows)
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
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    walls, device = [], 0.0
    for repeat in range(WARM_UP_STEPS + args.steps):
        with engine.step_by_hand(SamplingFeatures()) as loop:
            for i, prompt in enumerate(prompts):
                one = Sequence(0, list(prompt), len(prompt))
                loop.scheduler.add(SequenceGroup(str(i), None, params, 0, [one], len(prompt) + 1))
            began = time.perf_counter()
            loop.step()
            walls.append(time.perf_counter() - began)
        stats = loop.record.stats
        assert stats.batch_tokens.tolist() == [num_tokens], "the prompts were not computed in one step"
        device += stats.seconds["device"] if repeat >= WARM_UP_STEPS else 0.0
    name = name_of(engine.limits.kv_cache, engine.cache_config.page_size)
    seconds = statistics.median(walls[WARM_UP_STEPS:])
    m.add_point(name, "prefill", len(prompts), num_tokens, seconds, device / args.steps)


def run_requests(m: Measurement, system: str) -> None:
    """Requests at once, on the engine as users run it."""
    engine, args = m.engine, m.args
    count = max(2, round(RUNS[system] * args.run_share))
    workload = make_workload(args.workload, count, seed=1, max_len=engine.limits.max_model_len)
    result = measure(m.llm, make_requests(workload, engine.model.vocab_size, seed=1), system, None)
    run = {
        "system": system, "workload": args.workload, "requests": count, "seed": 1,
        "num_pages": engine.cache_config.num_pages, "max_model_len": engine.limits.max_model_len,
        "padding": padding_of(engine.runner.buckets), "steps": result.stats.steps, "seconds": round(result.seconds, 5),
        "device_seconds": round(result.stats.seconds["device"], 5),
        "normalized_latency": round(result.normalized_latency, 7),
        "mean_first_token_seconds": round(float(result.first_token_latencies.mean()), 5),
        "compilations": result.stats.compilations,
    }  # fmt: skip
    m.values["runs"].append(run)
    m.say(f"{system}: {count} requests in {result.seconds:.3f} s, {result.stats.steps} steps, "
          f"{result.stats.compilations} programs compiled meanwhile")  # fmt: skip
    m.write()  # a run takes long: whoever ends the measurement here keeps it


def fill_with_noise(engine: Engine) -> None:
    """Numbers as keys and values are, array by array: zeros would draw less power, and so flatter the clock."""
    leaves, treedef = jax.tree.flatten(engine.runner.pool)
    engine.runner.pool = jax.tree.unflatten(treedef, list(_noisy(leaves)))


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
