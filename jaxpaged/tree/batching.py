"""Cuts what a tree wants computed into steps within the engine's limits, however many nodes and tokens there are.

A span of one node is computed like a chunk of a prompt, or, if it is one token of which only the successor is asked, as
a row of a decode step. Its first positions may be in the pages already: they are run again because their logits are
wanted, and what they write goes to NULL_PAGE, so that neither a shared nor a pinned page ever changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxpaged.config import CacheConfig
from jaxpaged.host.sequence import Sequence, SequenceGroup
from jaxpaged.host.step.batching import Buckets, make_batch
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.host.step.step_plan import PlanRow, Sample, StepPlan
from jaxpaged.step_io import NULL_PAGE, MixedBatch, StepBatch


class Span(NamedTuple):
    """Positions [start, stop) of a sequence, to be computed; those before `write_from` are in its pages already."""

    sequence: Sequence
    start: int
    stop: int
    write_from: int

    @property
    def targets(self) -> list[int]:
        """The tokens whose log-probabilities the span gives: the successors of its positions, as far as known."""
        return self.sequence.token_ids[self.start + 1 : self.stop + 1]


class SpanOutputs(NamedTuple):
    """What running some spans gives; one entry a span."""

    next_logprobs: np.ndarray  # f32[n, V], or f32[n, k] best first: of the token behind each span
    next_ids: np.ndarray | None  # i32[n, k]; None: column v is token v
    target_logprobs: list[np.ndarray]  # f32 of each of its targets
    target_ranks: list[np.ndarray]  # i32, 1 is the likeliest token


@dataclass(slots=True)
class SpanStep:
    """One step for some spans: row r of the plan belongs to span `spans[r]`, sample s to span `ended[s]`."""

    plan: StepPlan
    spans: list[int]
    ended: list[int]


def plan_spans(
    spans: SequenceOf[Span], group: SequenceGroup, max_rows: int, max_tokens: int, wants_targets: bool
) -> Iterator[SpanStep]:
    """Steps that compute all the spans; every span ends in one of them. `group` says how rows are sampled: greedily."""
    single = [s.stop - s.start == 1 and not (wants_targets and s.targets) for s in spans]
    decoded = [i for i, is_single in enumerate(single) if is_single]
    for first in range(0, len(decoded), max_rows):
        step = SpanStep(StepPlan(is_prefill=False), [], [])
        for i in decoded[first : first + max_rows]:
            _add_row(step, group, i, spans[i], spans[i].start, 1)
        yield step
    step, budget = SpanStep(StepPlan(is_prefill=True), [], []), max_tokens
    for i, span in enumerate(spans):
        start = span.stop if single[i] else span.start
        while start < span.stop:
            if not budget or len(step.spans) == max_rows:
                yield step
                step, budget = SpanStep(StepPlan(is_prefill=True), [], []), max_tokens
            count = min(budget, span.stop - start)
            _add_row(step, group, i, span, start, count)
            start, budget = start + count, budget - count
    if step.spans:
        yield step


def _add_row(step: SpanStep, group: SequenceGroup, index: int, span: Span, start: int, count: int) -> None:
    step.plan.listed.append(PlanRow(group, span.sequence, start, count))
    step.spans.append(index)
    if start + count == span.stop:
        step.plan.samples.append(Sample(group, span.sequence, len(step.spans) - 1))
        step.ended.append(index)


def make_span_batch(
    step: SpanStep,
    spans: SequenceOf[Span],
    buckets: Buckets,
    cache: CacheConfig,
    vocab_size: int,
    features: SamplingFeatures,
) -> StepBatch:
    """The step's arrays, with no write to positions that are in the pages already."""
    plan = step.plan
    batch = make_batch(plan, buckets.shape_of(plan, features), cache, vocab_size, features)
    assert not isinstance(batch, MixedBatch), "a step of a tree has prompts or decodes"
    offset = 0
    for row, index in zip(plan.rows, step.spans, strict=True):
        kept = min(max(spans[index].write_from - row.start, 0), row.count)
        batch.inputs.slot_mapping[offset : offset + kept] = NULL_PAGE * cache.page_size
        offset += row.count
    return batch


def likeliest(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest of each row of f32[n, V], best first, and their columns; of equals the lower column first."""
    columns = np.sort(np.argpartition(-values, count - 1, axis=1)[:, :count], axis=1)
    order = np.argsort(-np.take_along_axis(values, columns, 1), axis=1, kind="stable")
    columns = np.take_along_axis(columns, order, 1)
    return np.take_along_axis(values, columns, 1), columns.astype(np.int32)
