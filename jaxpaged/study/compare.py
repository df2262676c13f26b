"""The same requests on the same engine, once for each way to keep KV memory: what `jaxpaged compare` measures.

What must be equal is equal by construction: one model and one sampler, one scheduler and its limits, a pool of the same
size, the same kernels wherever the cache has pages, the same prompts, forced output lengths, arrivals and seeds. What a
system needs to be compiled is compiled before its clock starts. Prompts are random token ids: only their lengths count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.outputs import RequestOutput
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.config import KV_CACHES, CacheConfig, EngineConfig
from jaxpaged.config.choices import choices_in_words
from jaxpaged.host.account.accounting import RunStats
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.study.account_file import saturated_steps, summarise
from jaxpaged.study.simulate import PAPER_POOL
from jaxpaged.study.workloads import Workload, arrival_times

#: Tokens of a request at most, for which the pool of the paper is `PAPER_POOL`.
PAPER_MAX_LEN = 2048
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Requests:
    """A workload as requests: prompts of its lengths, and parameters that force its output lengths."""

    workload: Workload
    prompts: list[list[int]]
    params: list[SamplingParams] | list[BeamSearchParams]

    @property
    def num_samples(self) -> int:
        """Samples or beams of each request."""
        return self.params[0].num_samples

    @property
    def num_output_tokens(self) -> int:
        """Of all samples; of beams, those of the one hypothesis that is returned."""
        returned = 1 if isinstance(self.params[0], BeamSearchParams) else self.num_samples
        return int(self.workload.output_lens.sum()) * returned


@dataclass(frozen=True)
class Result:
    """One system's run of the requests at one rate."""

    system: str
    rate: float | None  # requests a second; None: all at once
    attention: str  # which implementation read the cache
    stats: RunStats
    num_prompt_tokens: int
    num_output_tokens: int
    output_lens: np.ndarray  # i32[requests]
    arrivals: np.ndarray  # f64[requests] seconds since the run began
    latencies: np.ndarray  # f64[requests] seconds from arrival to the last token
    first_token_latencies: np.ndarray  # f64[requests] seconds from arrival to the first
    seconds: float  # from the start of the run to the last token
    tokens: list[list[list[int]]]  # of every request's samples

    @property
    def generated_per_second(self) -> float:
        return self.num_output_tokens / self.seconds

    @property
    def processed_per_second(self) -> float:
        """Prompt tokens count too, as in the continuous-batching study of Anyscale."""
        return (self.num_prompt_tokens + self.num_output_tokens) / self.seconds

    @property
    def normalized_latency(self) -> float:
        """Seconds a token: the mean over requests of latency / output length (Kwon et al. 2023, section 6.1)."""
        return float((self.latencies / self.output_lens).mean())

    @property
    def averaged_steps(self) -> np.ndarray:
        """bool[steps] over which batch and memory are averaged: while requests wait for admission, but for the first
        tenth of the run; over all steps, where that leaves none."""
        return saturated_steps(self.stats.waiting)

    @property
    def averaged_steps_name(self) -> str:
        return "over all steps" if self.averaged_steps.all() else "while requests wait"

    def summary(self) -> dict[str, Any]:
        """All figures, JSON-ready."""
        account = summarise(self.stats, self.averaged_steps)
        return {
            "system": self.system,
            "rate": self.rate,
            "attention": self.attention,
            "seconds": round(self.seconds, 4),
            "generated_tokens_per_second": round(self.generated_per_second, 2),
            "processed_tokens_per_second": round(self.processed_per_second, 2),
            "latency_seconds": _percentiles(self.latencies),
            "first_token_seconds": _percentiles(self.first_token_latencies),
            "normalized_latency_seconds": round(self.normalized_latency, 6),
            **account,
            "compilations": self.stats.compilations,
        }


@dataclass(frozen=True)
class Refusal:
    """A system that cannot run these requests, and why."""

    system: str
    reason: str


def default_num_pages(page_size: int, max_model_len: int) -> int:
    """The vLLM paper's pool, 983 pages of 16 tokens, in proportion to the longest request: it holds 7.7 of these."""
    num_tokens = PAPER_POOL.num_usable_tokens * max_model_len // PAPER_MAX_LEN
    return max(1, num_tokens // page_size) + 1


def check_systems(systems: Sequence[str]) -> None:
    for name in systems:
        if name not in KV_CACHES:
            raise ValueError(f"unknown system {name!r}; {choices_in_words(name, KV_CACHES)}")
    if not systems or len(set(systems)) < len(systems):
        raise ValueError(f"systems must be named once each, got {', '.join(systems) or 'none'}")


def find_refusals(
    systems: Sequence[str], workload: Workload, num_samples: int, cache: CacheConfig, limits: dict[str, Any]
) -> dict[str, str]:
    """Of the systems, those that cannot hold every request even alone, and why; ValueError where that is all of them.

    `limits`: arguments of `EngineConfig` besides `kv_cache`.
    """
    pairs = np.unique(np.stack([workload.prompt_lens, workload.output_lens]), axis=1).T.tolist()
    longest = limits["max_model_len"]
    for prompt_len, output_len in pairs:
        if prompt_len + output_len > longest:
            raise ValueError(
                f"a request of {prompt_len} and {output_len} tokens exceeds max_model_len={longest}: "
                "raise it, or give shorter requests"
            )
    reasons = {}
    for name in systems:
        try:
            scheduler = Scheduler(cache, EngineConfig(kv_cache=name, **limits))
            for prompt_len, output_len in pairs:
                scheduler.check(prompt_len, num_samples, prompt_len + output_len)
        except ValueError as error:
            reasons[name] = str(error)
    if len(reasons) == len(systems):
        raise ValueError("no system can run this workload: " + join_reasons(reasons))
    return reasons


def join_reasons(reasons: dict[str, str]) -> str:
    """By system; one that is the same for all stands alone."""
    if len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"{system}: {reason}" for system, reason in reasons.items())


def make_requests(
    workload: Workload, vocab_size: int, seed: int = 0, num_samples: int = 1, beam_width: int = 0
) -> Requests:
    """Random prompts. One sample is greedy, so that systems can be held against each other token by token; several are
    drawn at temperature 1, each request with a seed of its own."""
    rng = np.random.default_rng([seed, 1])
    prompts = [rng.integers(0, vocab_size, length).tolist() for length in workload.prompt_lens]
    lengths = workload.output_lens.tolist()
    if beam_width:
        beams = [BeamSearchParams(beam_width=beam_width, n=1, max_tokens=n, ignore_eos=True, early_stopping="never",
                                  detokenize=False) for n in lengths]  # fmt: skip
        return Requests(workload, prompts, beams)
    samples = [
        SamplingParams(
            n=num_samples, temperature=0.0 if num_samples == 1 else 1.0, seed=seed + i, max_tokens=length,
            ignore_eos=True, detokenize=False,
        )
        for i, length in enumerate(lengths)
    ]  # fmt: skip
    return Requests(workload, prompts, samples)


def at_rate(requests: Requests, rate: float | None, seed: int = 0) -> Requests:
    """The same requests, arriving at random at `rate` a second, or all at once."""
    count = len(requests.prompts)
    arrivals = arrival_times(count, rate, np.random.default_rng([seed, 2]))
    return Requests(requests.workload._replace(arrivals=arrivals), requests.prompts, requests.params)


def measure(
    llm: Any, requests: Requests, system: str, rate: float | None, on_finished: Callable[[int], None] | None = None
) -> Result:
    """Run the requests on an LLM that keeps its KV memory as `system`, already warm. `on_finished` is told how many.

    Pages of an earlier run of the same requests are not to be found.
    """
    workload = requests.workload
    llm.reset_prefix_cache()
    outputs: dict[int, RequestOutput] = {}
    results = llm.generate_iter(requests.prompts, requests.params, arrival_times=workload.arrivals.tolist())
    for output in results:
        outputs[int(output.request_id)] = output
        if on_finished is not None:
            on_finished(len(outputs))
    ordered = [outputs[i] for i in range(len(requests.prompts))]
    if failed := [output for output in ordered if output.error is not None]:
        raise ValueError(f"{system}: request {failed[0].request_id} could not go on: {failed[0].error}")
    tokens = [[sample.token_ids for sample in output.outputs] for output in ordered]
    for samples, length in zip(tokens, workload.output_lens, strict=True):
        assert all(len(sample) == length for sample in samples), "an output has not the length that was forced"
    metrics = [output.metrics for output in ordered]
    return Result(
        system, rate, llm.engine.kernels.name, llm.last_run,
        num_prompt_tokens=int(workload.prompt_lens.sum()),
        num_output_tokens=requests.num_output_tokens,
        output_lens=workload.output_lens,
        arrivals=workload.arrivals,
        latencies=np.array([one.finished_time - one.arrival_time for one in metrics]),
        first_token_latencies=np.array([one.first_token_time - one.arrival_time for one in metrics]),
        seconds=max(one.finished_time for one in metrics),
        tokens=tokens,
    )  # fmt: skip


def num_equal_requests(results: list[Result]) -> int:
    """Requests whose tokens are the same in every run."""
    return sum(all(tokens == first for tokens in others) for first, *others in
               zip(*(result.tokens for result in results), strict=True))  # fmt: skip


def _percentiles(values: np.ndarray) -> dict[str, float]:
    return {f"p{q}": round(float(np.percentile(values, q)), 4) for q in PERCENTILES}
