"""Figures 6, 8 and 9 of the PagedAttention paper through the scheduler: their page numbers, their reference counts.

The free list is scripted, since the figures name physical pages. Page 0 is never handed out here, so Figure 9, which
uses it, is told with every number one higher than in the paper.
"""

from __future__ import annotations

import numpy as np

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.request_params import RequestParams
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.config import CacheConfig, EngineConfig
from jaxpaged.host.beams.beam_state import BeamState
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.host.sequence import Sequence, SequenceGroup
from jaxpaged.host.step.step_plan import StepPlan
from jaxpaged.step_io import RowCandidates, StepOutputs, TokenLogprobs

FOUR_SCORE = [11, 12, 13, 14, 15, 16, 17]  # "Four score and seven years ago our"
IMPOSSIBLE = -1000.0


def make_scheduler(free: list[int], page_size: int) -> Scheduler:
    """Its allocator hands the pages of `free` out in this order."""
    limits = EngineConfig(max_model_len=64, max_num_seqs=8, max_num_batched_tokens=64, watermark=0.0)
    scheduler = Scheduler(CacheConfig(page_size, num_pages=60), limits)
    script(scheduler, free)
    return scheduler


def script(scheduler: Scheduler, first: list[int]) -> None:
    others = [page for page in scheduler.allocator._free if page not in first]
    scheduler.allocator._free = others + first[::-1]


def add(scheduler: Scheduler, prompt: list[int], params: RequestParams) -> SequenceGroup:
    group = SequenceGroup("0", None, params, 0, [Sequence(0, list(prompt), len(prompt))], len(prompt) + 12)
    if isinstance(params, BeamSearchParams):
        group.beams = BeamState.of(params, (), 12)
    scheduler.add(group)
    return group


def step(scheduler: Scheduler, candidates: RowCandidates | None = None) -> StepPlan:
    """One step; without candidates every sample chooses a token of its own."""
    plan = scheduler.schedule()
    assert plan is not None
    count = len(plan.samples)
    tokens = np.arange(50, 50 + count, dtype=np.int32)
    scheduler.commit(plan, StepOutputs(tokens, TokenLogprobs(np.zeros(count, np.float32)), candidates))
    scheduler.check_invariants()
    return plan


def tables(group: SequenceGroup) -> list[list[int]]:
    return [list(sequence.table.pages) for sequence in group.sequences]


def counts(scheduler: Scheduler, *pages: int) -> list[int]:
    return [scheduler.allocator.ref_count(page) for page in pages]


def test_figure_6_a_page_is_taken_when_the_last_is_full():
    scheduler = make_scheduler([7, 1, 3], page_size=4)
    group = add(scheduler, FOUR_SCORE, SamplingParams(temperature=0, max_tokens=12))
    step(scheduler)
    assert (tables(group), group.sequences[0].table.num_slots) == ([[7, 1]], 7)  # 4 and 3 filled
    step(scheduler)  # "fathers"
    assert (tables(group), group.sequences[0].table.num_slots) == ([[7, 1]], 8)
    step(scheduler)  # "brought"
    assert (tables(group), group.sequences[0].table.num_slots) == ([[7, 1, 3]], 9)


def test_figure_7_a_second_request_takes_pages_from_between():
    scheduler = make_scheduler([7, 1, 5, 2, 3], page_size=4)
    first = add(scheduler, FOUR_SCORE, SamplingParams(temperature=0, max_tokens=12))
    second = add(scheduler, [21, 22, 23, 24, 25], SamplingParams(temperature=0, max_tokens=12))  # "It was the best of"
    for _ in range(3):
        step(scheduler)
    assert (tables(first), tables(second)) == ([[7, 1, 3]], [[5, 2]])


def test_figure_8_of_two_samples_the_first_writer_copies_and_the_second_writes_in_place():
    scheduler = make_scheduler([7, 1, 3], page_size=4)
    group = add(scheduler, FOUR_SCORE, SamplingParams(n=2, max_tokens=12))
    step(scheduler)
    assert (tables(group), counts(scheduler, 7, 1)) == ([[7, 1], [7, 1]], [2, 2])
    plan = step(scheduler)
    assert plan.copies == [(1, 3)]
    assert (tables(group), counts(scheduler, 7, 1, 3)) == ([[7, 3], [7, 1]], [2, 1, 1])
    assert step(scheduler).copies == []


def survivors(*parents: int, rows: int = 4) -> RowCandidates:
    """Eight candidates of which those of `parents` (best first, a new token each) run on."""
    scores = np.full((rows, 8), IMPOSSIBLE, np.float32) - np.arange(8, dtype=np.float32)
    tokens = np.tile(np.arange(8, dtype=np.int32), (rows, 1))
    for rank, parent in enumerate(parents):
        scores[parent, np.flatnonzero(scores[parent] < IMPOSSIBLE / 2)[0]] = -1.0 - rank
    return RowCandidates(scores, tokens)


def test_figure_9_beams_share_what_they_have_in_common_and_losers_give_their_pages_back():
    """Before: 0-1-3-5, 0-1-3-6, 0-1-3-7, 0-2-4-8. The next four descend from the second and the third of them."""
    scheduler = make_scheduler([p + 1 for p in (0, 1, 2, 3, 5, 6, 4, 7, 8)], page_size=1)
    group = add(scheduler, [11], BeamSearchParams(beam_width=4, max_tokens=12))
    step(scheduler, survivors(0, 0, 0, 0, rows=1))  # the prompt's page, four beams
    step(scheduler, survivors(0, 0, 0, 1))  # 1, 2, and two that are dropped
    step(scheduler, survivors(0, 0, 0, 3))  # 3, two that are dropped, 4
    plan = scheduler.schedule()
    assert plan is not None
    paper = [[page - 1 for page in table] for table in tables(group)]
    assert paper == [[0, 1, 3, 5], [0, 1, 3, 6], [0, 1, 3, 7], [0, 2, 4, 8]]
    assert counts(scheduler, *range(1, 10)) == [4, 3, 1, 3, 1, 1, 1, 1, 1]  # pages 0 to 8

    nothing = TokenLogprobs(np.zeros(4, np.float32))
    scheduler.commit(plan, StepOutputs(np.zeros(4, np.int32), nothing, survivors(1, 1, 2, 2)))
    assert {p for p in range(9) if scheduler.allocator.ref_count(p + 1) == 0} == {2, 4, 5, 8}

    script(scheduler, [p + 1 for p in (9, 10, 11, 12)])
    plan = step(scheduler, survivors(0, 1, 2, 3))
    assert plan.copies == []
    paper = [[page - 1 for page in table] for table in tables(group)]
    assert paper == [[0, 1, 3, 6, 9], [0, 1, 3, 6, 10], [0, 1, 3, 7, 11], [0, 1, 3, 7, 12]]
    assert counts(scheduler, *(p + 1 for p in (0, 1, 3, 6, 7, 9, 10, 11, 12))) == [4, 4, 4, 2, 2, 1, 1, 1, 1]
