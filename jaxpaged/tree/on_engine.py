"""A tree's work on a real model: spans of its nodes as steps of the engine, over the engine's own page pool."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack

import numpy as np

from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.engine.engine import Engine
from jaxpaged.host.pages.block_table import PageCopy
from jaxpaged.host.sequence import SequenceGroup
from jaxpaged.host.step.batching import make_batch
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.host.step.step_plan import StepPlan
from jaxpaged.step_io import WHOLE_VOCABULARY, StepOutputs, TokenLogprobs
from jaxpaged.tree.batching import Span, SpanOutputs, SpanStep, likeliest, make_span_batch, plan_spans

#: Numbers of likeliest tokens for which steps are compiled; the whole vocabulary is selected from on the host.
TOP_SIZES = (5, 20, 100)


class EngineSteps:
    """Borrows the engine's pool until `close`; see `TreeModel` (tree.py) for what each method promises."""

    def __init__(self, engine: Engine):
        self._open = ExitStack()
        self._loan = loan = self._open.enter_context(engine.lend_pool())
        self.allocator = loan.allocator
        self.vocab_size = loan.model.vocab_size
        self.max_len = loan.limits.max_model_len
        self.eos_token_ids = frozenset(loan.model.eos_token_ids)
        self._group = SequenceGroup("tree", None, SamplingParams(temperature=0), 0, [], self.max_len)

    @property
    def is_lost(self) -> bool:
        return self._loan.has_lost_pool

    def copy_pages(self, copies: SequenceOf[PageCopy]) -> None:
        self._loan.copy_pages(copies)

    def run(self, spans: SequenceOf[Span], top: int | None, wants_targets: bool) -> SpanOutputs:
        loan, limits = self._loan, self._loan.limits
        width = self.vocab_size if top is None else top
        logprobs = np.empty((len(spans), width), np.float32)
        ids = None if top is None else np.empty((len(spans), width), np.int32)
        parts: list[list[np.ndarray]] = [[] for _ in spans]
        ranks: list[list[np.ndarray]] = [[] for _ in spans]
        steps = plan_spans(spans, self._group, limits.max_num_seqs, limits.max_num_batched_tokens, wants_targets)
        for step in steps:
            features = self._features(top, step.plan.is_prefill and wants_targets)
            batch = make_span_batch(step, spans, loan.buckets, loan.cache_config, self.vocab_size, features)
            outputs = loan.run(batch, features)
            _check_finite(step, outputs)
            if width:
                logprobs[step.ended], tokens = _best(outputs.token_logprobs, len(step.ended), top)
                if ids is not None:
                    ids[step.ended] = tokens
            if outputs.prompt_logprobs is not None:
                _file_targets(step, outputs.prompt_logprobs, parts, ranks)
        return SpanOutputs(logprobs, ids, _join(parts, spans, np.float32), _join(ranks, spans, np.int32))

    def warm_up(self, top: int | None) -> None:
        """Compile every program that a tree can need whose calls all ask for this `top`."""
        loan = self._loan
        for shape in loan.buckets.shapes():
            is_prefill = shape.num_tokens is not None
            kinds = [self._features(top, False)]
            if is_prefill:
                kinds += [self._features(top, True), self._features(0, True)]
            for features in kinds:
                nothing = StepPlan(is_prefill=is_prefill)
                batch = make_batch(nothing, shape, loan.cache_config, self.vocab_size, features)
                loan.compile_step(batch, features)
        loan.compile_copies()

    def close(self) -> None:
        self._open.close()

    def _features(self, top: int | None, wants_targets: bool) -> SamplingFeatures:
        size = WHOLE_VOCABULARY
        if top is not None:
            size = next((s for s in TOP_SIZES if top <= s <= self.vocab_size), WHOLE_VOCABULARY) if top else None
        return SamplingFeatures(
            has_samples=True, num_logprobs=size, num_prompt_logprobs=0 if wants_targets else None
        )  # fmt: skip


def _best(found: TokenLogprobs, num_rows: int, top: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """The `top` likeliest of a step's first rows, f32[R, k] and i32[R, k]; for None the vocabulary, f32[R, V]."""
    assert found.top_logprobs is not None
    values = found.top_logprobs[:num_rows]
    if top is None:
        return values, None
    if found.top_ids is None:
        return likeliest(values, top)
    return values[:, :top], found.top_ids[:num_rows, :top]


def _check_finite(step: SpanStep, outputs: StepOutputs) -> None:
    """ValueError where the model's logits behind some position are not numbers: a search must not go on from these."""
    num_tokens = sum(row.count for row in step.plan.rows)
    known = [] if outputs.prompt_logprobs is None else outputs.prompt_logprobs.logprobs[:num_tokens]
    if (outputs.tokens[: len(step.ended)] < 0).any() or np.isnan(known).any():
        raise ValueError(
            "the model's logits are not finite (NaN or infinity): its weights are damaged, or numbers overflow in this "
            "dtype; nothing was changed"
        )


def _file_targets(
    step: SpanStep, found: TokenLogprobs, logprobs: list[list[np.ndarray]], ranks: list[list[np.ndarray]]
) -> None:
    """Put what a step says of its packed tokens with the spans that they belong to."""
    assert found.ranks is not None
    offset = 0
    for row, index in zip(step.plan.rows, step.spans, strict=True):
        logprobs[index].append(found.logprobs[offset : offset + row.count])
        ranks[index].append(found.ranks[offset : offset + row.count])
        offset += row.count


def _join(parts: list[list[np.ndarray]], spans: SequenceOf[Span], dtype: type) -> list[np.ndarray]:
    """Each span's chunks in one array; what its last position says of an unknown successor is left out."""
    empty = np.empty(0, dtype)
    return [
        np.concatenate([empty, *chunks])[: len(span.targets)] for chunks, span in zip(parts, spans, strict=True)
    ]  # fmt: skip
