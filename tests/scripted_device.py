"""A device that is scripted, to run the scheduler without jax: it checks what a real one would read."""

from __future__ import annotations

import itertools

import numpy as np

from jaxpaged.config import CacheConfig, EngineConfig, PreemptionConfig
from jaxpaged.host.reservation import most_pages
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.host.sequence import Sequence, SequenceGroup
from jaxpaged.host.step_plan import StepPlan
from jaxpaged.sampling_params import SamplingParams
from jaxpaged.step_io import StepOutputs, TokenLogprobs

_ids = itertools.count()


def make_scheduler(
    num_pages, page_size=2, max_num_seqs=64, max_num_batched_tokens=64, max_model_len=100, preemption=None
):
    limits = EngineConfig(
        max_model_len, max_num_seqs, max_num_batched_tokens, preemption=preemption or PreemptionConfig()
    )
    return Scheduler(CacheConfig(page_size, num_pages), limits)


def make_group(prompt_len, max_tokens=4, n=1, **kwargs) -> SequenceGroup:
    params = SamplingParams(n=n, max_tokens=max_tokens, **kwargs)
    prompt = [1000 + i for i in range(prompt_len)]
    return SequenceGroup(
        str(next(_ids)), None, params, 0, [Sequence(0, prompt, prompt_len)], prompt_len + max_tokens,
        eos_ids=frozenset({0}), stop_ids=frozenset(params.stop_token_ids or ()),
    )  # fmt: skip


def script(sample) -> int:
    """The scripted model: a token that depends on the sample and the position, as a real one's does."""
    return 1 + (31 * sample.sequence.sample_index + sample.sequence.num_tokens) % 900


class PoolModel:
    """Checks what the device would read: every sequence's KV must be its own tokens."""

    def __init__(self, page_size, is_cached=True):
        self.page_size, self.is_cached = page_size, is_cached
        self.tokens: dict[tuple[int, int], int] = {}
        self.swapped: dict[SequenceGroup, list[list[int]]] = {}

    def swap(self, group: SequenceGroup, page_ids: list[int], is_out: bool) -> None:
        """Move whole pages; what was taken out is scribbled over at once."""
        slots = [[(page_id, offset) for offset in range(self.page_size)] for page_id in page_ids]
        if is_out:
            self.swapped[group] = [[self.tokens.get(slot, -1) for slot in page] for page in slots]
        for page, values in zip(slots, self.swapped[group], strict=True):
            self.tokens.update(dict.fromkeys(page, -2) if is_out else dict(zip(page, values, strict=True)))
        if not is_out:
            del self.swapped[group]

    def run(self, plan: StepPlan) -> StepOutputs:
        for swap in plan.swaps:
            self.swap(*swap)
        before = dict(self.tokens)
        for src, dst in plan.copies:
            for offset in range(self.page_size):
                self.tokens[dst, offset] = before.get((src, offset), -1)
        if not self.is_cached:
            assert all((row.start, row.count) == (0, row.sequence.num_tokens) for row in plan.rows)
            return self.choose(plan)
        for row in plan.rows:
            for position in range(row.start, row.start + row.count):
                page, offset = divmod(position, self.page_size)
                self.tokens[row.sequence.table.pages[page], offset] = row.sequence.token_ids[position]
        for row in plan.rows:
            pages, known = row.sequence.table.pages, row.start + row.count
            read = [self.tokens[pages[p // self.page_size], p % self.page_size] for p in range(known)]
            assert read == row.sequence.token_ids[:known]
        return self.choose(plan)

    def choose(self, plan: StepPlan) -> StepOutputs:
        tokens = np.array([script(sample) for sample in plan.samples], np.int32)
        return StepOutputs(tokens, TokenLogprobs(np.full(len(tokens), -1.0, np.float32)))


def run_all(scheduler: Scheduler, groups) -> tuple[dict[str, list[list[int]]], list[StepPlan]]:
    for group in groups:
        scheduler.add(group)
    pool, plans, done = PoolModel(scheduler.cache.page_size, scheduler.policy.is_cached), [], {}
    while (plan := scheduler.schedule()) is not None:
        plans.append(plan)
        for group in scheduler.commit(plan, pool.run(plan)):
            done[group.request_id] = [sequence.output_ids for sequence in group.sequences]
        scheduler.check_invariants()
        assert len(plans) < 5000, "the scheduler makes no progress"
    assert scheduler.allocator.num_used == 0 and not pool.swapped
    return done, plans


def most_pages_of(groups, page_size: int) -> int:
    """Pages of the smallest pool in which each of the groups can run to its end."""
    return max(most_pages(group.prompt_len, group.params.num_samples, group.max_len, page_size) for group in groups)
