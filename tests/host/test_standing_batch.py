"""Arrays that are kept from step to step are those that would be made anew."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_device import (
    PoolModel,
    begin,
    make_group,
    make_scheduler,
    make_search,
    most_pages_of,
    run_searches,
)

from jaxpaged.host.step import standing_batch
from jaxpaged.host.step.batching import Buckets, make_batch
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.host.step.standing_batch import BatchMaker
from jaxpaged.step_io import DecodeBatch, of_row

VOCABULARY = 1000
WAYS = [
    dict(),
    dict(seed=7, top_p=0.5),
    dict(min_p=0.1, min_tokens=1, logit_bias={5: 1.0}),
    dict(repetition_penalty=1.3),
    dict(allowed_token_ids=[5, 6]),
]


def assert_same(one, other):
    assert type(one) is type(other)
    for name, a, b in zip(one._fields, one, other, strict=True):
        if isinstance(a, tuple):
            assert_same(a, b)
        elif a is None or b is None:
            assert a is b, name
        elif name == "history" and not len(a):
            assert a.shape[1:] == b.shape[1:]
        else:
            np.testing.assert_array_equal(a, b, name)
            assert a.dtype == b.dtype, name


class DeviceHistory:
    """What a device makes of the histories that it is given, or keeps."""

    def check(self, batch, plan, pool) -> None:
        """Behind the step it has the tokens of every sample, those that the host does not know among them."""
        if len(batch.sampling.history):
            self.rows = batch.sampling.history.copy()
        inputs = batch.inputs
        tokens = [pool.latest[of_row(token)] if token < 0 else token for token in inputs.tokens.tolist()]
        self.rows[np.arange(len(tokens)), inputs.positions] = tokens
        for row, sample in enumerate(plan.samples):
            length = batch.sampling.history_lens[row]
            assert length == sample.sequence.num_tokens
            assert self.rows[row, :length].tolist() == [pool.token_at(sample.sequence, i) for i in range(length)]


def run_compared(scheduler, groups, is_async) -> None:
    """Run to the end, ahead of the tokens where that can be, and compare the arrays of every step."""
    begin(scheduler, groups)
    features = SamplingFeatures.of(groups, VOCABULARY)
    buckets, cache = Buckets.for_limits(scheduler.limits, scheduler.cache), scheduler.cache
    maker, pool, device = BatchMaker(cache, VOCABULARY), PoolModel(cache.page_size), DeviceHistory()

    def launch(plan):
        expected = make_batch(plan, buckets.shape_of(plan, features), cache, VOCABULARY, features)
        batch = maker.make(plan, buckets, features)
        assert_same(batch, expected)
        if features.needs_history and isinstance(batch, DecodeBatch):
            device.check(batch, plan, pool)
        return plan, pool.run(plan)

    flight = None
    while flight is not None or (plan := scheduler.schedule()) is not None:
        plan, outputs = flight or launch(plan)
        flight = None
        if is_async and not features.needs_tokens:
            scheduler.foresee(plan)
            if (following := scheduler.schedule(is_ahead=True)) is not None:
                flight = launch(following)
        scheduler.commit(plan, outputs)


requests = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 14), st.integers(1, 3), st.booleans()), min_size=1, max_size=6
)  # prompt_len, max_tokens, n, whether the first sample ends by a token


@settings(max_examples=50, deadline=None)
@given(requests, st.sampled_from(WAYS), st.integers(1, 5), st.integers(0, 6), st.integers(3, 9), st.booleans())
def test_in_every_step_of_any_run(requests, way, page_size, spare, max_num_seqs, is_async):
    groups = [
        make_group(prompt_len, most, n, **way, stop_token_ids=[3 + prompt_len] if ends else None)
        for prompt_len, most, n, ends in requests
    ]
    pages = most_pages_of(groups, page_size) + 1 + spare
    run_compared(make_scheduler(pages, page_size, max_num_seqs), groups, is_async)


def run_searches_compared(scheduler, groups) -> SamplingFeatures:
    features = SamplingFeatures.of(groups, VOCABULARY)
    buckets, cache = Buckets.for_limits(scheduler.limits, scheduler.cache), scheduler.cache
    maker = BatchMaker(cache, VOCABULARY)

    def compare(plan):
        expected = make_batch(plan, buckets.shape_of(plan, features), cache, VOCABULARY, features)
        assert_same(maker.make(plan, buckets, features), expected)

    run_searches(scheduler, groups, compare)
    return features


def test_in_every_step_of_searches_whose_beams_take_the_places_of_others():
    """Where the last pages are full a beam goes on from another's without a copy, so that nothing else shows it."""
    groups = [make_search(3, max_tokens=9, width=3), make_group(4, 9), make_search(6, max_tokens=8, width=4)]
    run_searches_compared(make_scheduler(64, page_size=2), groups)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("width", [3, 16])
def test_in_every_step_of_samples_that_go_on_when_the_searches_are_over(width, way):
    groups = [make_search(3, max_tokens=3, width=width), make_group(4, 12, **way)]
    features = run_searches_compared(make_scheduler(128, page_size=4, max_num_seqs=20), groups)
    assert features.merged_widths == ((2, 4) if width == 3 else (16, 16))


@pytest.mark.parametrize("is_async", [True, False])
def test_a_batch_that_stays_is_not_made_anew(monkeypatch, is_async):
    made = []
    monkeypatch.setattr(standing_batch, "make_batch", lambda *args: (made.append(args), make_batch(*args))[1])
    run_compared(make_scheduler(64, page_size=2), [make_group(3, 12), make_group(4, 12)], is_async)
    assert len(made) == 2  # the prompts, and the first decode step
