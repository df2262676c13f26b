"""The scheduler without jax: a scripted device plays the model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_device import make_group, make_scheduler, most_pages_of, run_all


def test_prompts_are_prefilled_together_and_then_decoded_together():
    _, plans = run_all(make_scheduler(64), [make_group(5, 3), make_group(2, 3)])
    assert [(plan.is_prefill, [row.count for row in plan.rows]) for plan in plans] == [
        (True, [5, 2]),
        (False, [1, 1]),
        (False, [1, 1]),
    ]


def test_a_long_prompt_is_computed_in_chunks_and_sampled_once():
    _, plans = run_all(make_scheduler(64, max_num_batched_tokens=4), [make_group(10, 2)])
    assert [(row.start, row.count) for plan in plans for row in plan.rows] == [(0, 4), (4, 4), (8, 2), (10, 1)]
    assert [len(plan.samples) for plan in plans] == [0, 0, 1, 1]


def test_samples_share_one_prefill_and_copy_the_part_filled_page_n_minus_1_times():
    group = make_group(5, 4, n=4)
    outputs, plans = run_all(make_scheduler(64), [group])
    assert len(plans[0].rows) == 1 and len(plans[0].samples) == 4
    assert [len(plan.copies) for plan in plans] == [0, 3, 0, 0]
    assert group.pages.copied == 3 and group.pages.most_shared == 9  # four tables over three pages
    assert len({tuple(tokens) for tokens in outputs[group.request_id]}) == 4


def test_a_full_last_page_is_shared_without_a_copy():
    _, plans = run_all(make_scheduler(64), [make_group(6, 4, n=4)])
    assert sum(len(plan.copies) for plan in plans) == 0


def test_the_latest_arrival_is_preempted_and_resumed_with_the_same_tokens():
    groups = [make_group(4, 12), make_group(4, 12)]
    outputs, plans = run_all(make_scheduler(11), groups)
    assert [group.num_preemptions for group in groups][0] == 0
    assert groups[1].num_preemptions > 0 and groups[1].recomputed_tokens > 0
    assert sum(plan.num_preempted for plan in plans) == groups[1].num_preemptions
    endless, _ = run_all(make_scheduler(1000), more := [make_group(4, 12), make_group(4, 12)])
    assert [outputs[g.request_id] for g in groups] == [endless[g.request_id] for g in more]


def test_a_preempted_group_shares_its_prompt_again():
    first, second = make_group(8, 12), make_group(8, 6, n=3)
    run_all(make_scheduler(16), [first, second])
    assert second.num_preemptions > 0
    # The three samples recompute the four prompt pages once, and only their own tails besides.
    assert second.recomputed_tokens < 3 * 8


def test_requests_run_in_order_of_arrival_within_max_num_seqs():
    groups = [make_group(2, 2) for _ in range(5)]
    _, plans = run_all(make_scheduler(64, max_num_seqs=2), groups)
    assert max(len(plan.rows) for plan in plans) == 2
    first_seen = list(dict.fromkeys(row.group.request_id for plan in plans for row in plan.rows))
    assert first_seen == [group.request_id for group in groups]


def test_one_token_rows_are_not_computed_among_longer_ones():
    _, plans = run_all(make_scheduler(64), [make_group(n, 1) for n in (5, 3, 1, 1, 4)])
    assert [[row.count for row in plan.rows] for plan in plans] == [[5, 3], [1, 1], [4]]


@pytest.mark.parametrize(
    ("kwargs", "reason", "expected"),
    [
        (dict(stop_token_ids=[5]), 5, [3, 4, 5]),
        (dict(max_tokens=3), None, [3, 4, 5]),
        (dict(stop_token_ids=[4], min_tokens=3, max_tokens=6), None, [3, 4, 5, 6, 7, 8]),
    ],
)
def test_a_sample_ends_by_token_or_length(kwargs, reason, expected):
    group = make_group(2, **{"max_tokens": 8, **kwargs})
    outputs, _ = run_all(make_scheduler(64), [group])
    assert outputs[group.request_id] == [expected]
    assert group.sequences[0].stop_reason == reason


def test_a_request_that_can_never_fit_is_refused_with_the_numbers():
    scheduler = make_scheduler(num_pages=8, page_size=2)
    with pytest.raises(
        ValueError, match=r"prompt of 9 tokens .* up to 8 tokens needs 8 pages of 2 tokens, the pool has 7"
    ):
        scheduler.add(make_group(9, 8))
    scheduler.add(make_group(9, 6))  # 14 positions are written, the last token's never: 7 pages
    with pytest.raises(ValueError, match="max_num_seqs=64"):
        scheduler.add(make_group(1, 1, n=65))
    with pytest.raises(ValueError, match="no room to generate: max_model_len is 100"):
        scheduler.add(make_group(100, 1))


requests = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4)), min_size=1, max_size=8
)  # prompt_len, max_tokens, n


@settings(max_examples=100, deadline=None)
@given(requests, st.integers(1, 5), st.integers(0, 6), st.integers(1, 40), st.integers(4, 10))
def test_every_request_finishes_in_any_pool_that_holds_the_largest(requests, page_size, spare, budget, max_num_seqs):
    """The tokens do not depend on the pool, the page size or the budget, and no page leaks."""
    groups = [make_group(*request) for request in requests]
    largest = most_pages_of(groups, page_size)
    small = make_scheduler(largest + 1 + spare, page_size, max_num_seqs, budget)
    outputs, _ = run_all(small, groups)
    assert len(outputs) == len(groups)
    for group, (prompt_len, max_tokens, n) in zip(groups, requests, strict=True):
        for i, tokens in enumerate(outputs[group.request_id]):
            assert tokens == [1 + (31 * i + prompt_len + t) % 900 for t in range(max_tokens)]
        assert len(outputs[group.request_id]) == n
        assert group.pages.physical_at_peak <= largest
