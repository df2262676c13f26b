"""`jaxpaged simulate`: what ways to keep KV memory do with a workload, without a model or an accelerator."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from jaxpaged.api.values import read_int, read_number, read_seed
from jaxpaged.cli.errors import usage_errors
from jaxpaged.cli.output_files import check_outputs
from jaxpaged.config import KV_CACHES, CacheConfig, EngineOptions, PreemptionConfig
from jaxpaged.host.account.memory_account import CATEGORIES
from jaxpaged.requests.progress import ProgressBar
from jaxpaged.study.account_file import check_account_name, saturated_steps, summarise, write_account
from jaxpaged.study.simulate import PAPER_POOL, Simulation, paper_limits
from jaxpaged.study.workloads import MAX_REQUESTS, Workload, make_workload, read_workload

#: Of a simulated pool, whose pages are entries of lists.
MAX_PAGES = 10_000_000
INT32_MAX = 2**31 - 1
WATERMARK = EngineOptions.watermark
#: Beyond these, sums of seconds no longer tell steps apart.
MAX_STEP_MS = 1e6
MIN_RATE, MAX_RATE = 1e-6, 1e9

EPILOG = """\
workloads: sharegpt, alpaca, alpaca-lognormal, azure-code, azure-chat, translation, exponential:PROMPT:MEAN:CAP,
  fixed:PROMPT:OUTPUT, or a .jsonl file with {"prompt_len": ..., "output_len": ...} a line (and "arrival", in seconds)

Means are over the steps in which requests wait for admission, but for the first tenth of all steps; over all steps
where there are none such. The last line is the same as JSON.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--workload", default="sharegpt", metavar="NAME", help="or a .jsonl file; see below (default sharegpt)")
    add("--requests", type=int, default=2000, metavar="N", help="requests drawn (default 2000)")
    add("--seed", type=int, default=0, metavar="N", help="of lengths, arrivals and beams (default 0)")
    add("--rate", type=float, metavar="X", help="requests a second (default: all arrive at once)")
    add("--step-ms", type=float, default=30.0, metavar="X", help="milliseconds of a step, for arrivals (default 30)")
    add("--n", type=int, default=1, metavar="N", help="samples of each request (default 1)")
    add("--beam-width", type=int, default=0, metavar="N", help="beams of each request, by random scores")
    add(
        "--kv-cache", action="append", metavar="NAME",
        help=f"one of {', '.join(KV_CACHES)}; repeat for more (default: all that keep KV)",
    )  # fmt: skip
    add("--num-pages", type=int, default=PAPER_POOL.num_pages, metavar="N", help="page 0 included (default 984)")
    add("--page-size", type=int, default=16, metavar="N", help="token positions in a page (default 16)")
    add("--max-model-len", type=int, default=2048, metavar="N", help="tokens of a sequence at most (default 2048)")
    add("--max-num-seqs", type=int, default=2048, metavar="N", help="sequences together at most (default 2048)")
    add("--max-num-batched-tokens", type=int, default=2560, metavar="N", help="in one prefill step (default 2560)")
    free = f"share of the pool left free (default {WATERMARK})"
    add("--watermark", type=float, default=WATERMARK, metavar="X", help=free)
    add("--preemption", choices=("recompute", "swap"), default="recompute", help="(default recompute)")
    add("--account", metavar="FILE", help="every step's account, .csv or .json; with one --kv-cache")


@usage_errors()
def run(args: argparse.Namespace, _make_llm: object) -> int:
    _check_sizes(args)
    systems = args.kv_cache or [name for name in KV_CACHES if name != "none"]
    check_account_name(args.account)
    check_outputs({"--account": args.account}, {"workload": args.workload if _is_file(args.workload) else None})
    if args.account is not None and len(systems) != 1:
        raise ValueError(f"--account writes one run, but {len(systems)} systems are to run: give one --kv-cache")
    workload = _workload(args)
    simulations = {name: _simulation(args, name, workload) for name in systems}
    print(f"{'per cent of the pool':20}" + "".join(f"{name:>10}" for name in (*CATEGORIES, "stranded", "sequences")))
    results: dict[str, Any] = {}
    for name, simulation in simulations.items():
        began = time.perf_counter()
        with ProgressBar(len(workload.prompt_lens), lambda one=simulation: one.stats) as bar:
            stats = simulation.run(on_finished=bar.update)
        seconds = time.perf_counter() - began
        summary = summarise(stats, saturated_steps(stats.waiting))
        shares = summary["percent_of_pool"]
        cells = [*(shares[part] for part in (*CATEGORIES, "stranded")), summary["mean_running_sequences"]]
        print(f"{name:20}" + "".join(f"{cell:10.2f}" for cell in cells), flush=True)
        results[name] = {**summary, "requests_per_second": round(len(workload.prompt_lens) / seconds)}
        if args.account is not None:
            write_account(stats, args.account)
    print(
        json.dumps(
            {"workload": args.workload, "requests": len(workload.prompt_lens), "results": results}, allow_nan=False
        )
    )
    return 0


def _is_file(workload: str) -> bool:
    return Path(workload).suffix == ".jsonl"


def _check_sizes(args: argparse.Namespace) -> None:
    """What is kept in memory for every page and request, and what goes into arrays of 32 bits."""
    for name, most in (("requests", MAX_REQUESTS), ("num_pages", MAX_PAGES)):
        read_int("--" + name.replace("_", "-"), getattr(args, name), 1, most)
    for name in ("page_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens"):
        read_int("--" + name.replace("_", "-"), getattr(args, name), 1, INT32_MAX)
    read_int("--n", args.n, 1, INT32_MAX)
    read_int("--beam-width", args.beam_width, 0, INT32_MAX)
    read_seed(args.seed)
    read_number("--step-ms", args.step_ms, 0, MAX_STEP_MS, f"above 0, and at most {MAX_STEP_MS:g}")
    if args.rate is not None:
        read_number(
            "--rate", args.rate, MIN_RATE, MAX_RATE, f"above 0 requests a second, in [{MIN_RATE:g}, {MAX_RATE:g}]"
        )


def _workload(args: argparse.Namespace) -> Workload:
    if _is_file(args.workload):
        return read_workload(args.workload)
    return make_workload(args.workload, args.requests, args.seed, args.rate, args.max_model_len)


def _simulation(args: argparse.Namespace, kv_cache: str, workload: Workload) -> Simulation:
    cache = CacheConfig(args.page_size, args.num_pages)
    swap = PreemptionConfig("swap", swap_pages=cache.num_usable_pages)
    limits = paper_limits(
        kv_cache, max_model_len=args.max_model_len, max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens, watermark=args.watermark,
        preemption=swap if args.preemption == "swap" and kv_cache == "paged" else None,
    )  # fmt: skip
    return Simulation(workload, cache, limits, args.n, args.beam_width, args.seed, args.step_ms / 1000)
