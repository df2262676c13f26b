"""What a way to keep KV memory does with a workload, from lengths alone: no model, no accelerator, no jax.

    stats = Simulation(make_workload("sharegpt", 4000), PAPER_POOL, paper_limits("contiguous-max")).run()
    print(stats.memory.shares(), stats.running.mean())

The scheduler and its policies are those of the engine; only the device is scripted: it chooses tokens that end nothing,
and for beams the best of random ones. So the steps, and the account of each, are those that the engine would take. Long
stretches of steps in which sequences only grow are taken at once (study/fast_forward.py).

Time is what a clock says: a step takes as long as any other, or what steps like it took on a device (step_table.py).
With the latter, arrivals and latencies are those of that device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.config import CacheConfig, EngineConfig, EngineOptions, PreemptionConfig
from jaxpaged.host.account.accounting import RunStats
from jaxpaged.host.beams.beam_state import BeamState
from jaxpaged.host.scheduler import Sample, Scheduler, StepPlan
from jaxpaged.host.sequence import Sequence, SequenceGroup
from jaxpaged.step_io import RowCandidates, StepOutputs, TokenLogprobs
from jaxpaged.study.fast_forward import advance, num_quiet_steps
from jaxpaged.study.workloads import Workload

#: What the vLLM paper had for OPT-13B on a GPU of 40 GB: 983 pages of 16 tokens, and page 0, which is never used.
PAPER_POOL = CacheConfig(page_size=16, num_pages=984)
#: Seconds f64[n] of a planned step, and of n - 1 decode steps behind it in which its rows only grow by a token each.
Clock = Callable[[StepPlan, int], np.ndarray]
#: Tokens among which the beams of a simulation choose, with standard normal logits.
BEAM_VOCABULARY = 256


def paper_limits(
    kv_cache: str = "paged",
    *,
    max_model_len: int = 2048,
    max_num_seqs: int = 2048,
    max_num_batched_tokens: int = 2560,
    watermark: float = EngineOptions.watermark,
    preemption: PreemptionConfig | None = None,
    mixed_steps: bool = False,
) -> EngineConfig:
    """The scheduler's limits as the artifact of the vLLM paper has them, which lets nobody decode beside prompts."""
    return EngineConfig(
        max_model_len, max_num_seqs, max_num_batched_tokens, watermark=watermark,
        preemption=preemption or PreemptionConfig(), kv_cache=kv_cache, mixed_steps=mixed_steps,
    )  # fmt: skip


class Simulation:
    """One run of a workload, every request with `num_samples` samples or, where `beam_width` is not 0, so many beams.

    A request is queued at the first step that starts at its arrival or later.

    Attributes:
        now: seconds since the run began.
        first_token_times, finished_times: f64[N] seconds at which each request had its first token, and its last;
            NaN where it has not.
    """

    def __init__(
        self,
        workload: Workload,
        cache: CacheConfig,
        limits: EngineConfig,
        num_samples: int = 1,
        beam_width: int = 0,
        seed: int = 0,
        step_seconds: float | Clock = 0.03,
        one_by_one: bool = False,
        device: Callable[[StepPlan], StepOutputs] | None = None,
        prefix_len: int = 0,
    ):
        """Raises ValueError for requests that could not run, before any does.

        `one_by_one`: plan every step. `device` takes the place of the scripted one, which needs every step, too.
        `prefix_len`: tokens that come before every prompt of the workload; with pages the run shares them.
        """
        if beam_width and num_samples > 1:
            raise ValueError(f"a request has samples or beams: num_samples={num_samples}, beam_width={beam_width}")
        if prefix_len < 0:
            raise ValueError(f"prefix_len must be at least 0, got {prefix_len}")
        if not callable(step_seconds) and not step_seconds > 0:
            raise ValueError(f"step_seconds must be above 0, got {step_seconds}")
        self.workload = workload
        # Lengths alone are given, so all prompts begin alike: nothing is to be found for that.
        self.scheduler = Scheduler(cache, dataclasses.replace(limits, prefix_caching=False))
        self._prompt_lens = workload.prompt_lens + prefix_len
        self._shared_len = prefix_len if self.scheduler.policy.shares_pages else 0
        self.params: SamplingParams | BeamSearchParams = (
            BeamSearchParams(beam_width=beam_width, max_tokens=None, early_stopping="never")
            if beam_width
            else SamplingParams(n=num_samples, max_tokens=None, ignore_eos=True)
        )
        self._clock = step_seconds if callable(step_seconds) else _constant(step_seconds)
        self.now = 0.0
        self.first_token_times, self.finished_times = np.full((2, len(workload.arrivals)), np.nan)
        self._one_by_one = one_by_one or device is not None
        self._run = device or self._outputs
        self._rng = np.random.default_rng(seed)
        self._num_queued = 0
        self.stats = RunStats.for_cache(cache)
        self._check()
        self.scheduler.longest_output = int(workload.output_lens.max(initial=0))
        if self._shared_len and len(workload.prompt_lens):
            self.scheduler.share_prefix([0] * self._shared_len)

    def _check(self) -> None:
        pairs = np.unique(np.stack([self._prompt_lens, self.workload.output_lens]), axis=1).T.tolist()
        longest = self.scheduler.limits.max_model_len
        for prompt_len, output_len in pairs:
            if prompt_len + output_len > longest:
                raise ValueError(
                    f"a request of {prompt_len} and {output_len} tokens exceeds max_model_len={longest}: raise it, "
                    "or draw shorter requests"
                )
            self.scheduler.check(prompt_len, self.params.num_samples, prompt_len + output_len, self._shared_len)

    def run(self, max_steps: int | None = None, on_finished: Callable[[int], None] | None = None) -> RunStats:
        """Run to the end, or for about `max_steps` steps. `on_finished` is told how many requests have finished."""
        scheduler, stats = self.scheduler, self.stats
        stats.num_requests = len(self.workload.prompt_lens)
        stats.num_prompt_tokens = int(self._prompt_lens.sum())
        num_finished = 0
        while self._num_queued < len(self.workload.arrivals) or scheduler.has_work:
            num_unqueued = self._queue()
            plan = scheduler.schedule()
            if plan is None:  # nothing to do before the next arrival
                self.now = float(self.workload.arrivals[self._num_queued])
                continue
            stats.record(plan, scheduler, num_unqueued)
            stats.add_tokens(plan)
            self._take_time(plan)
            finished = scheduler.commit(plan, self._run(plan))
            self._note_times(plan, finished)
            num_finished += len(finished)
            if finished and on_finished is not None:
                on_finished(num_finished)
            if max_steps is not None and stats.steps >= max_steps:
                break
        return stats

    def _queue(self) -> int:
        """Queue requests that have arrived, as many as one step could admit; returns how many more have arrived."""
        arrived = self._num_arrived()
        end = min(arrived, self._num_queued + self.scheduler.limits.max_num_seqs + 1 - len(self.scheduler.waiting))
        for index in range(self._num_queued, end):
            self.scheduler.add(self._group(index))
        self._num_queued = max(end, self._num_queued)  # one that was preempted may lie on top of the most
        return arrived - self._num_queued

    def _num_arrived(self) -> int:
        return int(np.searchsorted(self.workload.arrivals, self.now, side="right"))

    def _note_times(self, plan: StepPlan, finished: list[SequenceGroup]) -> None:
        if plan.is_prefill:
            for group in dict.fromkeys(sample.group for sample in plan.samples):
                if np.isnan(self.first_token_times[index := int(group.request_id)]):
                    self.first_token_times[index] = self.now
        for group in finished:
            self.finished_times[int(group.request_id)] = self.now

    def _group(self, index: int) -> SequenceGroup:
        prompt_len, output_len = int(self._prompt_lens[index]), int(self.workload.output_lens[index])
        group = SequenceGroup(
            str(index), None, self.params, index, [Sequence(0, [0] * prompt_len, prompt_len)], prompt_len + output_len,
            prefix_len=self._shared_len,
        )  # fmt: skip
        if isinstance(self.params, BeamSearchParams):
            group.beams = BeamState.of(self.params, (), output_len)
        return group

    def _take_time(self, plan: StepPlan) -> None:
        """The planned step runs, and with it those that can follow it at once: until one starts at an arrival."""
        most = 0 if self._one_by_one else num_quiet_steps(plan, self.scheduler)
        # The times at which the steps start, and the last one ends. Summed as they would be one by one.
        times = np.cumsum(np.concatenate([[self.now], self._clock(plan, 1 + most)]))
        count = most
        if (arrived := self._num_arrived()) < len(self.workload.arrivals):
            # The next one may be admitted, or at least it waits, which the account says.
            count = int(np.searchsorted(times[1 : most + 1], self.workload.arrivals[arrived]))
        if count > 0:
            advance(plan, self.scheduler, self.stats, count, [_token(sample) for sample in plan.samples])
        for began, ended in zip(times[: count + 1].tolist(), times[1 : count + 2].tolist(), strict=True):
            self.stats.add_times(began, ended)
        self.now = float(times[count + 1])

    def _outputs(self, plan: StepPlan) -> StepOutputs:
        """What the scripted device chooses: of samples a token that tells them apart, of beams random candidates."""
        samples = plan.samples
        tokens = np.fromiter(map(_token, samples), np.int32, len(samples))
        outputs = StepOutputs(tokens, TokenLogprobs(np.zeros(len(samples), np.float32)))
        if isinstance(self.params, BeamSearchParams) and samples:
            outputs = outputs._replace(candidates=self._candidates(samples, 2 * max(self.params.widths)))
        return outputs

    def _candidates(self, samples: list[Sample], count: int) -> RowCandidates:
        logits = self._rng.standard_normal((len(samples), BEAM_VOCABULARY), np.float32)
        tokens = np.argsort(-logits, axis=1)[:, :count].astype(np.int32)
        logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        sums = np.array([sample.sequence.cumulative_logprob for sample in samples], np.float32)
        return RowCandidates(np.take_along_axis(logprobs, tokens, 1) + sums[:, None], tokens)


def _constant(step_seconds: float) -> Clock:
    return lambda plan, num_steps: np.full(num_steps, step_seconds)


def _token(sample: Sample) -> int:
    """Never that of the prompts, which is 0: samples share their prompt, and nothing behind it."""
    return 1 + sample.sequence.sample_index
