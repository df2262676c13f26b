"""Pages that no window reaches: given back while their sequences go on, and nobody gets another token for it."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_prefix_cache import calls, run_calls, stems, ways


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    calls, st.lists(stems, min_size=1, max_size=3), st.sampled_from([0, 0, 3, 8]), st.integers(1, 4),
    st.integers(0, 12), st.integers(1, 40), ways, st.booleans(), st.booleans(), st.sampled_from([1, 2, 3, 5, 8, 13]),
)  # fmt: skip
def test_random_calls_get_the_tokens_that_they_get_with_all_pages(
    all_calls, stem_list, prefix_len, page_size, spare, budget, preemption, mixed, caching, window
):
    """Small pools, in which requests are longer than the pool; who reads a position within its window reads what its
    own tokens say, and pages that are free hold nothing of use."""
    arguments = all_calls, stem_list, prefix_len, page_size, spare, budget, preemption, mixed
    with_window, _ = run_calls(*arguments, caching, window)
    assert with_window == run_calls(*arguments, caching=False)[0]
