"""How long the engine's own steps take on this device: what `reproduce.py --step-times` replays whole days with.

    python scripts/bench/step_times.py scripts/shapes/opt-13b -o scripts/step_times/opt-13b-h100.json     # on a GPU
    python scripts/bench/step_times.py checkpoints/tiny-python -o times.json --decode-rows 1 8 32 --num-pages 400

Weights, keys and values are random, only config.json is read. Every time is the wall time of a step of the engine's
loop (engine/step_loop.py), which decides, packs and sends the next one meanwhile. A decode step is measured in the
middle of a simulated run (simulate.py), whose scheduler the engine takes over, at several numbers of rows and of tokens
that these read; medians of `--steps`. Prefill steps likewise, over numbers of new tokens.

paged        decode and prefill, pages of 16 tokens; what is reserved in one piece is read in the same way
moves        pages that are copied, and swapped out and back
runs         a few requests at once on the engine itself, for each system: what a replay is held against
dense        decode and prefill over rows of `--max-model-len` tokens, and decode over rows of 544 (Anyscale's least);
             runs of static batches and of dense rows
samples      decode, six samples of each prompt; beams: six beams
page-sizes   decode over pages of other sizes

The file is written after each part, so a run that is cut short keeps what it has; a part that cannot run is listed with
its reason. The pool has twice the pages that the runs use, so that many rows have room for their context.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from step_measurement import (
    WARM_UP_STEPS,
    Measurement,
    compile_together,
    contexts_for,
    decode_shapes,
    median_seconds,
    run_requests,
    shapes,
    time_decode,
    time_prefill,
)

from jaxpaged.config import CacheConfig, EngineConfig
from jaxpaged.device import swap
from jaxpaged.engine.preemption import resolve_preemption
from jaxpaged.host.step.batching import Buckets, split
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.study.simulate import PAPER_POOL, Simulation
from jaxpaged.study.workloads import Workload

PARTS = ("paged", "moves", "runs", "dense", "samples", "beams", "page-sizes")
#: Samples or beams of each prompt, and the tokens of the prompt, as Alpaca has them.
WIDTH, SHARED_PROMPT = 6, 20
#: Requests that run together in the paper's pool, with ShareGPT's lengths and with Alpaca's.
USUAL_BATCH, LARGEST_BATCH = 32, 256
#: Of the batching figure's shortest outputs: 512 tokens and 32.
SHORT_MAX_LEN = 544


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
    for size in engine.runner.buckets.copies:
        if 2 * size > usable:
            break
        copies = np.stack([ids[:size], ids[-size:]])

        def copy(copies: np.ndarray = copies) -> None:
            engine.runner.copy_arrays(copies)
            jax.block_until_ready(engine.runner.pool)

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
            fetched = swap.fetch_pages(engine.runner.pages, ids[:size], parts, host, engine.device)
            gone = time.perf_counter()
            engine.runner.pool = swap.restore_pages(engine.runner.pages, ids[-size:], fetched, engine.device)
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


def measure_dense(m: Measurement) -> None:
    """Rows as long as the pages of `--num-pages` hold: with `--max-model-len` tokens each, and with fewer."""
    args = m.args
    prefill_tokens = sorted({*args.prefill_tokens[1::2], args.prefill_tokens[-1]})
    for max_len in (args.max_model_len, min(SHORT_MAX_LEN, args.max_model_len // 2)):
        num_rows = (args.num_pages - 1) // -(-max_len // 16)
        rows = 1 << (num_rows - 1).bit_length()
        m.rebuild([rows], prefill_tokens, kv_cache="dense", num_pages=args.num_pages, max_model_len=max_len)
        is_long = max_len == args.max_model_len
        compile_together(m, shapes(m.engine) if is_long else decode_shapes(m.engine))
        longest = max_len - args.steps - WARM_UP_STEPS - 4
        for context in sorted({longest // 16, longest // 4, longest}):
            time_decode(m, num_rows, context, 1)
        if is_long:
            for tokens in prefill_tokens:
                time_prefill(m, tokens, longest=max_len // 2)
            if "runs" in args.parts:
                for system in ("dense-static", "dense"):
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
