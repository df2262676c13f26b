"""How long the host takes to schedule and commit one decode step; needs neither jax nor a device.

    python scripts/bench_host.py [--sequences 256] [--context 512] [--steps 200] [--samples-per-request 1]

Prints medians in microseconds, and the same as JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import numpy as np

from jaxpaged.config import CacheConfig, EngineConfig
from jaxpaged.host.accounting import RunStats
from jaxpaged.host.batching import Buckets, make_batch
from jaxpaged.host.features import SamplingFeatures
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.host.sequence import Sequence, SequenceGroup
from jaxpaged.sampling_params import SamplingParams
from jaxpaged.step_io import StepOutputs, TokenLogprobs, pack

VOCAB_SIZE = 32_000
FEATURES = SamplingFeatures(is_random=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--context", type=int, default=512, help="prompt tokens of each request")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--samples-per-request", type=int, default=1)
    parser.add_argument("--page-size", type=int, default=16)
    args = parser.parse_args(argv)
    medians = {name: round(statistics.median(times) * 1e6, 1) for name, times in measure(args).items()}
    for name, micros in medians.items():
        print(f"{name:>10} {micros:8.1f} us a step")
    print(json.dumps({**vars(args), "microseconds": medians, "python": sys.version.split()[0]}))
    return 0


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each part of every decode step, and of the sum of `schedule` and `commit`."""
    max_len = args.context + args.steps + 2
    pages = args.sequences * -(-max_len // args.page_size) + 2
    cache = CacheConfig(args.page_size, pages)
    limits = EngineConfig(max_len, max_num_seqs=args.sequences, max_num_batched_tokens=8192, watermark=0.0)
    scheduler, buckets = Scheduler(cache, limits), Buckets.for_limits(limits, cache)
    rng = np.random.default_rng(0)
    for i in range(args.sequences // args.samples_per_request):
        scheduler.add(_request(i, rng.integers(0, VOCAB_SIZE, args.context).tolist(), args))
    stats = RunStats.for_cache(cache)
    times: dict[str, list[float]] = {"schedule": [], "account": [], "batching": [], "commit": [], "schedule+commit": []}
    while scheduler.has_work:
        t0 = time.perf_counter()
        plan = scheduler.schedule()
        assert plan is not None
        t1 = time.perf_counter()
        stats.record(plan, scheduler)
        t2 = time.perf_counter()
        if not plan.is_prefill:
            shape = buckets.shape_of(plan, FEATURES)
            pack(make_batch(plan, shape, cache, VOCAB_SIZE, FEATURES))
        t3 = time.perf_counter()
        outputs = StepOutputs(
            rng.integers(0, VOCAB_SIZE, len(plan.samples), np.int32),
            TokenLogprobs(np.zeros(len(plan.samples), np.float32)),
        )
        t4 = time.perf_counter()
        scheduler.commit(plan, outputs)
        t5 = time.perf_counter()
        if not plan.is_prefill and len(plan.rows) == args.sequences:
            for name, seconds in zip(times, (t1 - t0, t2 - t1, t3 - t2, t5 - t4, t1 - t0 + t5 - t4), strict=True):
                times[name].append(seconds)
    return times


def _request(index: int, prompt: list[int], args: argparse.Namespace) -> SequenceGroup:
    params = SamplingParams(n=args.samples_per_request, max_tokens=args.steps, ignore_eos=True)
    return SequenceGroup(
        str(index), None, params, index, [Sequence(0, prompt, len(prompt))], max_len=len(prompt) + args.steps
    )


if __name__ == "__main__":
    sys.exit(main())
