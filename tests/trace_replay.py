"""A second reader of traces, as their documentation says they are to be read; the first is the page's JavaScript.

Also random loads on the real scheduler, with a scripted device, for what reads traces.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.config import CacheConfig, EngineConfig
from jaxpaged.host.account.trace import TraceRecorder
from jaxpaged.host.beams.beam_state import BeamState
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.host.sequence import Sequence, SequenceGroup
from jaxpaged.host.step.step_plan import StepPlan
from jaxpaged.step_io import RowCandidates, StepOutputs, TokenLogprobs


class Replay:
    """Tables, filled positions and tokens of every sequence, frame by frame."""

    def __init__(self, trace: dict[str, Any]):
        count = len(trace["sequences"])
        self.tables: list[list[int]] = [[] for _ in range(count)]
        self.num_slots = [0] * count
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.cached: set[int] = set(trace.get("cached", []))
        self.page_size = trace["page_size"]

    def apply(self, frame: dict[str, Any]) -> None:
        for sequence, count in frame.get("gone", []):
            self.tables[sequence][:count] = [0] * count
        for sequence in frame.get("grow", []):
            self.num_slots[sequence] += 1
        for sequence, kept, num_slots, *pages in frame.get("tables", []):
            self.tables[sequence][kept:] = pages
            self.num_slots[sequence] = num_slots
        for sequence, *tokens in frame.get("tokens", []):
            self.tokens[sequence] += tokens
        for sequence, parent, kept, *tokens in frame.get("forks", []):
            self.tables[sequence] = self.tables[parent][:]
            self.num_slots[sequence] = self.num_slots[parent]
            self.tokens[sequence] = self.tokens[parent][:kept] + tokens
        self.cached.update(frame.get("cached", []))
        self.cached.difference_update(frame.get("uncached", []))

    @property
    def ref_counts(self) -> Counter[int]:
        return Counter(page for table in self.tables for page in table if page)

    @property
    def filled(self) -> dict[int, int]:
        """Positions of each page that are filled, by the table that sees most of it."""
        filled: dict[int, int] = {}
        for table, num_slots in zip(self.tables, self.num_slots, strict=True):
            for i, page in enumerate(table):
                seen = min(self.page_size, num_slots - i * self.page_size)
                filled[page] = max(filled.get(page, 0), seen)
        return filled


def random_outputs(plan: StepPlan, scheduler: Scheduler, rng: np.random.Generator) -> StepOutputs:
    """Tokens for every sample and candidates for every beam, from a small vocabulary, so that beams meet and part."""
    count = len(plan.samples)
    candidates = RowCandidates(
        np.sort(-rng.exponential(size=(count, 32)).astype(np.float32))[:, ::-1].copy(),
        np.stack([rng.permutation(np.arange(1, 60, dtype=np.int32))[:32] for _ in range(count)])
        if count
        else np.zeros((0, 32), np.int32),
    )
    return StepOutputs(
        rng.integers(1, 60, count).astype(np.int32), TokenLogprobs(np.zeros(count, np.float32)), candidates
    )


def random_group(i: int, rng: np.random.Generator, prefix: list[int]) -> SequenceGroup:
    prompt = prefix + rng.integers(1, 60, rng.integers(1, 20)).tolist()
    max_tokens = int(rng.integers(2, 24))
    params = (
        BeamSearchParams(beam_width=int(rng.integers(2, 6)), max_tokens=max_tokens)
        if i % 3 == 0
        else SamplingParams(n=int(rng.integers(1, 5)), max_tokens=max_tokens)
    )
    group = SequenceGroup(
        f"r{i}", None, params, 0, [Sequence(0, prompt, len(prompt))], len(prompt) + max_tokens, eos_ids=frozenset({7}),
        prefix_len=len(prefix),
    )  # fmt: skip
    if isinstance(params, BeamSearchParams):
        group.beams = BeamState.of(params, group.eos_ids, max_tokens)
    return group


def make_scheduler(num_pages: int, page_size: int, preemption, max_num_seqs=64, window=None) -> Scheduler:
    limits = EngineConfig(100, max_num_seqs, 48, preemption=preemption)
    return Scheduler(CacheConfig(page_size, num_pages, window=window), limits)


def record_random_load(
    seed: int, num_groups: int, scheduler: Scheduler, look=lambda recorder: None, prefix_len=0
) -> TraceRecorder:
    """Run to the end, half of the requests coming on the way; `look` is called after each plan and each commit."""
    rng = np.random.default_rng(seed)
    recorder = TraceRecorder(scheduler.cache)
    prefix = rng.integers(1, 60, prefix_len).tolist()
    groups = [random_group(i, rng, prefix) for i in range(num_groups)]
    if prefix:
        scheduler.share_prefix(prefix)
    for group in groups[: num_groups // 2]:
        scheduler.add(group)
    late = iter(groups[num_groups // 2 :])
    while scheduler.has_work:
        plan = scheduler.schedule()
        assert plan is not None
        recorder.planned(plan, scheduler)
        look(recorder)
        scheduler.commit(plan, random_outputs(plan, scheduler, rng))
        recorder.committed(scheduler)
        look(recorder)
        if (group := next(late, None)) is not None:
            scheduler.add(group)
    return recorder
