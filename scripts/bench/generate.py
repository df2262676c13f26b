"""Tokens per second over whole workloads, beside each peer that is installed, and where the time goes.

    python scripts/bench/generate.py scripts/shapes/llama-3.1-8b [--workloads chat384 256x128+512] [--peers vllm]
    python scripts/bench/generate.py checkpoints/tiny-python --load-format auto --dtype float32 --workloads 64x32+64

Workloads are named by their lengths (generation_workloads.py). Each is run once to compile and `--repeats` times for
the clock; the run of the median time is shown. Peers run in processes of their own (generation_peers.py), before ours
takes the device's memory. Columns:

found      share of the prompts' tokens that were found in pages of earlier requests of the same run
device     share of the time in which a step was launched or ran; the rest is exposed host
floor      share of the time that the device would need at its simplest jobs: a decode step reads all weights and the
           keys and values of its rows at the rate of a copy, a prompt's token costs two operations a weight at the rate
           of a large matrix product

Prints a table, and the same as JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import jax
from device_timing import Card, measure_card
from generation_peers import PEERS, add_shared_flags, installed_peers, median_of, run_peer
from generation_workloads import GenerationWorkload, make_workload

import jaxpaged
from jaxpaged import LLM, SamplingParams
from jaxpaged.checkpoint import open_checkpoint
from jaxpaged.config import EngineOptions
from jaxpaged.device.memory import start_device
from jaxpaged.engine.preemption import flops_per_token
from jaxpaged.host.account.accounting import RunStats

#: Of a workload's calls.
SUMMED = (
    "steps", "prefill_steps", "mixed_steps", "preemptions", "compilations", "num_prompt_tokens", "cached_tokens",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args, workloads = parse_args(argv)
    peers = {name: run_peer(name, args) for name in args.peers}
    start_device(args.memory_utilization)  # before anything else uses JAX
    card = measure_card(args.repeats)
    began = time.perf_counter()
    llm = LLM(args.model, **options_of(args))
    load_seconds = round(time.perf_counter() - began, 1)
    print(f"{args.model} on {card.device}: copy {card.copy_gb_per_s:,.0f} GB/s, matrix products "
          f"{card.matmul_tflop_per_s:,.3g} TFLOP/s; loaded in {load_seconds} s, "
          f"{llm.engine.cache_config.num_usable_tokens:,} tokens of KV")  # fmt: skip
    print(f"{'workload':>18} {'tokens/s':>10} {'first s':>8} {'s':>8} {'steps':>7} {'found':>6} "
          f"{'device':>7} {'floor':>6}"
          + "".join(f"{name:>14} {'ratio':>6}" for name in args.peers))  # fmt: skip
    results = []
    for workload in workloads:
        result = measure(llm, workload, card, args.repeats)
        row = (f"{workload.name:>18} {result['tokens_per_second']:10,.0f} {result['first_seconds']:8.1f} "
               f"{result['seconds']:8.3f} {result['steps']:7} "
               f"{result['cached_tokens'] / result['num_prompt_tokens']:6.1%} {result['device_share']:7.1%} "
               f"{result['floor_share']:6.1%}")  # fmt: skip
        for peer in args.peers:
            if (theirs := peers[peer].get(workload.name)) is not None:
                result[peer] = theirs
                ratio = result[f"over_{peer}"] = round(result["tokens_per_second"] / theirs["tokens_per_second"], 3)
                row += f"{theirs['tokens_per_second']:14,.0f} {ratio:6.2f}"
        print(row, flush=True)
        results.append(result)
    left_out = {name: found["left_out"] for name, found in peers.items() if "left_out" in found}
    facts = {
        **vars(args), "attention": llm.engine.kernels.name, "load_seconds": load_seconds, "card": card._asdict(),
        "kv_tokens": llm.engine.cache_config.num_usable_tokens, "left_out": left_out, "jax": jax.__version__,
        "jaxpaged": jaxpaged.__version__,
    }  # fmt: skip
    print(json.dumps({**facts, "results": results}, allow_nan=False))
    return 0


def measure(llm: LLM, workload: GenerationWorkload, card: Card, repeats: int) -> dict[str, Any]:
    runs: list[tuple[float, list[RunStats]]] = []
    for _ in range(1 + repeats):
        calls: list[RunStats] = []

        def generate(prompts: list[list[int]], lengths: list[int], calls: list[RunStats] = calls) -> list[list[int]]:
            params = [
                SamplingParams(n=workload.num_samples, max_tokens=new, ignore_eos=True, detokenize=False)
                for new in lengths
            ]
            outputs = llm.generate(prompts, params, progress=False)
            calls.append(llm.last_run)
            return [output.outputs[0].token_ids for output in outputs]

        llm.reset_prefix_cache()
        began = time.perf_counter()
        workload.run(generate)
        runs.append((time.perf_counter() - began, calls))
    first, *others = runs
    median = median_of([seconds for seconds, _ in others])
    calls = next(calls for seconds, calls in others if seconds == median)
    totals = {name: sum(getattr(stats, name) for stats in calls) for name in SUMMED}
    split = {name: sum(stats.seconds[name] for stats in calls) for name in calls[0].seconds}
    return {
        "workload": workload.name,
        "tokens_per_second": round(workload.num_generated / median, 1),
        "first_seconds": round(first[0], 2),
        "seconds": round(median, 4),
        "all_seconds": [round(seconds, 4) for seconds, _ in others],
        **totals,
        "compilations_first": sum(stats.compilations for stats in first[1]),
        "device_share": round(split["device"] / median, 4),
        "split": {name: round(value, 4) for name, value in split.items()},
        "floor_share": round(floor_seconds(llm, workload, totals, card) / median, 4),
    }


def floor_seconds(llm: LLM, workload: GenerationWorkload, totals: dict[str, int], card: Card) -> float:
    """What the device needs at least for these tokens in so many steps, but for what was found."""
    engine = llm.engine
    weights = flops_per_token(engine.model) / 2  # of the layers' matrices
    itemsize, kv_itemsize = (jax.numpy.dtype(dtype).itemsize for dtype in (engine.dtype, engine.cache_config.dtype))
    head = engine.model.vocab_size * engine.model.embedding_dim
    token_bytes = engine.model.kv_bytes_per_token(kv_itemsize)
    tokens_read = sum(
        workload.num_samples * (prompt_len * new + new * (new + 1) // 2) for prompt_len, new in workload.lengths()
    )
    num_bytes = (totals["steps"] - totals["prefill_steps"]) * (weights + head) * itemsize + tokens_read * token_bytes
    num_flops = 2 * weights * (totals["num_prompt_tokens"] - totals["cached_tokens"])
    return num_bytes / (card.copy_gb_per_s * 1e9) + num_flops / (card.matmul_tflop_per_s * 1e12)


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, list[GenerationWorkload]]:
    """The flags, and the workloads that they name; what cannot run is one line, before any peer is started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_flags(parser)
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="(default: those that are installed, on a GPU)")
    parser.add_argument("--peer-timeout", type=int, default=900, help="seconds")
    parser.add_argument("--num-pages", type=int, default=None)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--no-async-scheduling", action="store_true", help="wait for every step")
    parser.add_argument("--no-mixed-steps", action="store_true", help="let nobody decode while prompts are computed")
    args = parser.parse_args(argv)
    if args.peers is None:
        import importlib.util

        has_gpu = importlib.util.find_spec("jax_cuda13_plugin") or importlib.util.find_spec("jax_cuda12_plugin")
        args.peers = installed_peers() if has_gpu else []
    try:
        return args, read_workloads(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    names = (
        "load_format", "dtype", "max_num_seqs", "num_pages", "max_model_len", "page_size", "attention",
        "memory_utilization",
    )  # fmt: skip
    names_of_switches = ("async_scheduling", "mixed_steps", "prefix_caching")
    switches = {name: not getattr(args, "no_" + name) for name in names_of_switches}
    return {name: getattr(args, name) for name in names} | switches


def read_workloads(args: argparse.Namespace) -> list[GenerationWorkload]:
    """Of the model's vocabulary. `args.max_model_len` becomes the model's where that is shorter."""
    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats}: a run to compile is not timed, so at least 1")
    model = open_checkpoint(args.model).config
    args.max_model_len = min(args.max_model_len, model.max_position_embeddings)
    EngineOptions(**options_of(args))
    return [make_workload(name, model.vocab_size, args.seed, args.max_model_len) for name in args.workloads]


if __name__ == "__main__":
    sys.exit(main())
