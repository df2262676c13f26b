"""A device that is scripted, to run the scheduler without jax: it checks what a real one would read."""

from __future__ import annotations

import itertools

import numpy as np

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.config import CacheConfig, EngineConfig, PreemptionConfig
from jaxpaged.host.beams.beam_state import BeamState, best_hypotheses
from jaxpaged.host.pages.shared_prefix import prefix_of
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.host.sequence import Sequence, SequenceGroup
from jaxpaged.host.step.step_plan import StepPlan
from jaxpaged.host.systems.reservation import most_pages
from jaxpaged.step_io import RowCandidates, StepOutputs, TokenLogprobs

_ids = itertools.count()


def make_scheduler(
    num_pages,
    page_size=2,
    max_num_seqs=64,
    max_num_batched_tokens=64,
    max_model_len=100,
    preemption=None,
    mixed_steps=True,
    prefix_caching=False,
    window=None,
):
    limits = EngineConfig(
        max_model_len, max_num_seqs, max_num_batched_tokens, preemption=preemption or PreemptionConfig(),
        mixed_steps=mixed_steps, prefix_caching=prefix_caching,
    )  # fmt: skip
    return Scheduler(CacheConfig(page_size, num_pages, window=window), limits)


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
    """Checks what the device would read: every sequence's KV must be its own tokens, as far back as its window goes."""

    def __init__(self, page_size, is_cached=True, window=None):
        self.page_size, self.is_cached, self.window = page_size, is_cached, window
        self.tokens: dict[tuple[int, int], int] = {}
        self.latest: list[int] = []  # what the last step chose, which the host may not know yet
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
                self.tokens[row.sequence.table.pages[page], offset] = self.token_at(row.sequence, position)
        for row in plan.rows:
            first = 0 if self.window is None else max(0, row.start - self.window + 1)
            pages, known = row.sequence.table.pages, range(first, row.start + row.count)
            read = [self.tokens[pages[p // self.page_size], p % self.page_size] for p in known]
            assert read == [self.token_at(row.sequence, position) for position in known]
        return self.choose(plan)

    def token_at(self, sequence: Sequence, position: int) -> int:
        known = sequence.token_ids
        return known[position] if position < len(known) else self.latest[sequence.pending_row]

    def choose(self, plan: StepPlan) -> StepOutputs:
        self.latest = [script(sample) for sample in plan.samples]
        tokens = np.array(self.latest, np.int32)
        return StepOutputs(tokens, TokenLogprobs(np.full(len(tokens), -1.0, np.float32)))


def begin(scheduler: Scheduler, groups: list[SequenceGroup]) -> None:
    """Queue all groups, behind the prefix that they share, if they do."""
    if prefix := prefix_of(groups):
        scheduler.share_prefix(prefix)
    for group in groups:
        scheduler.add(group)


def run_all(scheduler: Scheduler, groups) -> tuple[dict[str, list[list[int]]], list[StepPlan]]:
    begin(scheduler, groups)
    cache, is_cached, plans, done = scheduler.cache, scheduler.limits.kv_cache != "none", [], {}
    pool = PoolModel(cache.page_size, is_cached, cache.window)
    while (plan := scheduler.schedule()) is not None:
        plans.append(plan)
        for group in scheduler.commit(plan, pool.run(plan)):
            done[group.request_id] = [sequence.output_ids for sequence in group.sequences]
        scheduler.check_invariants()
        assert len(plans) < 5000, "the scheduler makes no progress"
    assert scheduler.allocator.num_used == sum(len(table.pages) for table in scheduler.prefix_tables)
    assert not pool.swapped
    return done, plans


def run_ahead(scheduler: Scheduler, groups) -> tuple[dict[str, list[list[int]]], list[StepPlan]]:
    """As `run_all`, but every step that can be is planned, and run, before the host learns what the last one chose."""
    begin(scheduler, groups)
    pool, plans, done, flight = PoolModel(scheduler.cache.page_size, window=scheduler.cache.window), [], {}, None
    while flight is not None or (plan := scheduler.schedule()) is not None:
        plan, outputs = flight or (plan, pool.run(plan))
        flight = None
        plans.append(plan)
        if scheduler.can_foresee(plan):
            scheduler.foresee(plan)
            if (following := scheduler.schedule(is_ahead=True)) is not None:
                flight = following, pool.run(following)
        for group in scheduler.commit(plan, outputs):
            done[group.request_id] = [sequence.output_ids for sequence in group.sequences]
        scheduler.check_invariants()
        assert len(plans) < 5000, "the scheduler makes no progress"
    assert scheduler.allocator.num_used == sum(len(table.pages) for table in scheduler.prefix_tables)
    assert not pool.swapped
    return done, plans


def make_search(prompt_len, max_tokens, width) -> SequenceGroup:
    group = make_group(prompt_len, max_tokens)
    group.params = BeamSearchParams(beam_width=width, max_tokens=max_tokens)
    group.beams = BeamState.of(group.params, (), max_tokens)
    return group


class BeamPoolModel(PoolModel):
    """Gives every row the same number of candidates, told by the row's own tokens."""

    def run(self, plan):
        outputs = super().run(plan)
        if not any(sample.group.beams for sample in plan.samples):
            return outputs
        k = 40
        scores, tokens = np.zeros((len(plan.samples), k), np.float32), np.zeros((len(plan.samples), k), np.int32)
        for i, sample in enumerate(plan.samples):
            # 997 is prime: k different tokens, and log-probabilities that hardly ever tie
            tokens[i] = (sum(sample.sequence.token_ids) * 31 + 7 * np.arange(k)) % 997
            step = np.sort((tokens[i] * 389 % 997 + 1) / 300)
            scores[i] = sample.sequence.cumulative_logprob - step
        return StepOutputs(outputs.tokens, outputs.token_logprobs, RowCandidates(scores, tokens))


def run_searches(scheduler, groups, look=lambda plan: None) -> list:
    """What every group gave in the end; `look` is called with each plan."""
    begin(scheduler, groups)
    pool = BeamPoolModel(scheduler.cache.page_size, window=scheduler.cache.window)
    for _ in range(5000):
        plan = scheduler.schedule()
        if plan is None:
            break
        look(plan)
        scheduler.commit(plan, pool.run(plan))
        scheduler.check_invariants()
    assert not scheduler.has_work
    assert scheduler.allocator.num_used == sum(len(table.pages) for table in scheduler.prefix_tables)
    return [
        [(h.token_ids, h.score) for h in best_hypotheses(group.beams, 99)]
        if group.beams
        else [sequence.output_ids for sequence in group.sequences]
        for group in groups
    ]


def most_pages_of(groups, page_size: int, window: int | None = None) -> int:
    """Pages of the smallest pool in which each of the groups can run to its end."""
    pages = []
    for group in groups:
        num_samples, prefix_len = group.params.num_samples, group.prefix_len
        most = most_pages(group.prompt_len, num_samples, group.max_len, page_size, prefix_len)
        if window is not None and num_samples == 1 and not prefix_len:
            most = min(most, -(-(window - 1) // page_size) + 1)
        pages.append(most)
    return max(pages)
