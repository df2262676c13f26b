"""How long the host takes for one decode step, over a device that is scripted; needs no jax.

    python scripts/bench/host.py [--sequences 256] [--context 512] [--steps 200] [--samples-per-request 1]
    python scripts/bench/host.py --sequences 64 --beam-width 4      # beam search: 16 prompts of width 4
    python scripts/bench/host.py --beam-width 64                    # 4 prompts of width 64

Of beams the device's part (the likeliest continuations of each row or group) is drawn at random, so that beams fork and
die at every step. Prints medians in microseconds, and the same as JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.request_params import RequestParams
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.config import CacheConfig, EngineConfig
from jaxpaged.host.account.accounting import RunStats
from jaxpaged.host.beams.beam_state import BeamState
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.host.sequence import Sequence, SequenceGroup
from jaxpaged.host.step.batching import Buckets
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.host.step.standing_batch import BatchMaker
from jaxpaged.host.step.step_plan import StepPlan
from jaxpaged.step_io import GroupCandidates, RowCandidates, StepOutputs, TokenLogprobs, pack

R = TypeVar("R")

VOCAB_SIZE = 32_000
PARTS = ("foresee", "schedule", "account", "batching", "commit", "all")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--context", type=int, default=512, help="prompt tokens of each request")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--samples-per-request", type=int, default=1)
    parser.add_argument("--beam-width", type=int, default=0, help="beam searches of this width instead of samples")
    parser.add_argument("--page-size", type=int, default=16)
    args = parser.parse_args(argv)
    if (error := check(args)) is not None:
        parser.exit(2, f"{parser.prog}: {error}\n")
    medians = {name: round(statistics.median(times) * 1e6, 1) for name, times in measure(args).items()}
    for name, micros in medians.items():
        print(f"{name:>16} {micros:8.1f} us a step")
    print(json.dumps({**vars(args), "microseconds": medians, "python": sys.version.split()[0]}, allow_nan=False))
    return 0


def check(args: argparse.Namespace) -> str | None:
    """Why these sizes cannot be measured."""
    per_request = args.beam_width or args.samples_per_request
    if min(args.sequences, args.context, args.samples_per_request, args.page_size) < 1 or args.beam_width < 0:
        return "counts and lengths are at least 1"
    if args.steps < 3:
        return f"--steps {args.steps}: the first and the last step are not measured, so at least 3"
    if args.sequences % per_request:
        return f"--sequences {args.sequences} are no whole number of requests with {per_request} each"
    return None


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each part of every decode step, in the engine's order (engine/step_loop.py); and their sum."""
    rng = np.random.default_rng(0)
    scheduler, features = _queue(args, rng)
    planner = _Planner(scheduler, features)
    times: dict[str, list[float]] = {name: [] for name in PARTS}
    plan = scheduler.schedule()
    while plan is not None:
        outputs = _outputs(plan, features, rng)
        is_ahead, following, parts, foreseen = scheduler.can_foresee(plan), None, (), 0.0
        if is_ahead:
            _, foreseen = _timed(scheduler.foresee, plan)
            following, parts = planner.plan(is_ahead)
        _, committed = _timed(scheduler.commit, plan, outputs)
        if not is_ahead:
            following, parts = planner.plan(is_ahead)
        if following is not None and not plan.is_prefill and following.num_rows == args.sequences:
            parts = (foreseen, *parts, committed)
            for name, seconds in zip(PARTS, (*parts, sum(parts)), strict=True):
                times[name].append(seconds)
        plan = following
    return times


def _queue(args: argparse.Namespace, rng: np.random.Generator) -> tuple[Scheduler, SamplingFeatures]:
    """A scheduler in whose pool all sequences run together, with the requests in its queue."""
    max_len = args.context + args.steps + 2
    cache = CacheConfig(args.page_size, args.sequences * -(-max_len // args.page_size) + 2)
    limits = EngineConfig(  # all are to decode together, so none begins before the last prompt is computed
        max_len, max_num_seqs=args.sequences, max_num_batched_tokens=8192, watermark=0.0, mixed_steps=False
    )
    scheduler = Scheduler(cache, limits)
    scheduler.gathers_beams = True
    num_requests = args.sequences // (args.beam_width or args.samples_per_request)
    groups = [_request(i, rng.integers(0, VOCAB_SIZE, args.context).tolist(), args) for i in range(num_requests)]
    for group in groups:
        scheduler.add(group)
    return scheduler, SamplingFeatures.of(groups, VOCAB_SIZE)


class _Planner:
    """Plans steps and makes their arrays."""

    def __init__(self, scheduler: Scheduler, features: SamplingFeatures):
        self._scheduler = scheduler
        self._features = features
        self._stats = RunStats.for_cache(scheduler.cache)
        self._buckets = Buckets.for_limits(scheduler.limits, scheduler.cache)
        self._batches = BatchMaker(scheduler.cache, VOCAB_SIZE)

    def plan(self, is_ahead: bool) -> tuple[StepPlan | None, tuple[float, ...]]:
        """The next step, and the seconds of its plan, its account and its arrays."""
        plan, scheduled = _timed(self._scheduler.schedule, is_ahead)
        if plan is None:
            return None, ()
        _, accounted = _timed(self._stats.record, plan, self._scheduler)
        _, made = _timed(lambda: pack(self._batches.make(plan, self._buckets, self._features)))
        return plan, (scheduled, accounted, made)


def _timed(function: Callable[..., R], *args: Any) -> tuple[R, float]:
    began = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - began


def _request(index: int, prompt: list[int], args: argparse.Namespace) -> SequenceGroup:
    params: RequestParams
    if args.beam_width:
        params = BeamSearchParams(beam_width=args.beam_width, max_tokens=args.steps, ignore_eos=True)
    else:
        params = SamplingParams(n=args.samples_per_request, max_tokens=args.steps, ignore_eos=True)
    group = SequenceGroup(
        str(index), None, params, index, [Sequence(0, prompt, len(prompt))], max_len=len(prompt) + args.steps
    )
    if isinstance(params, BeamSearchParams):
        group.beams = BeamState.of(params, (), args.steps)
    return group


def _outputs(plan: StepPlan, features: SamplingFeatures, rng: np.random.Generator) -> StepOutputs:
    """What a device might say of this plan: of beams, candidates whose scores fall by a random step each."""
    rows, count = len(plan.samples), features.num_candidates
    tokens, logprobs = rng.integers(0, VOCAB_SIZE, rows, np.int32), TokenLogprobs(np.zeros(rows, np.float32))
    if not count:
        return StepOutputs(tokens, logprobs)
    if plan.is_prefill:
        scores = -np.cumsum(rng.exponential(1.0, (rows, count)), axis=1, dtype=np.float32)
        return StepOutputs(tokens, logprobs, RowCandidates(scores, rng.integers(0, VOCAB_SIZE, scores.shape, np.int32)))
    shape = len(plan.searches), count
    sums = np.array([search.group.beams[0].running_scores[0] for search in plan.searches], np.float32)
    scores = sums[:, None] - np.cumsum(rng.exponential(1.0, shape), axis=1, dtype=np.float32)
    width = plan.searches[0].width
    parents, ids = rng.integers(0, width, shape, np.int32), rng.integers(0, VOCAB_SIZE, shape, np.int32)
    return StepOutputs(tokens, logprobs, GroupCandidates(scores, parents, ids))


if __name__ == "__main__":
    sys.exit(main())
