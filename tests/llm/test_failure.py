"""A request that ends with an error, by the scheduler alone: its memory is back, and no other request notices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_device import BeamPoolModel, begin, make_group, make_scheduler, make_search, run_searches

from jaxpaged.config import PreemptionConfig
from jaxpaged.step_io import BAD_LOGITS, BAD_PROCESSED


class FailingModel(BeamPoolModel):
    """Has no token for what `fails` says, of a sample."""

    def __init__(self, page_size, fails):
        super().__init__(page_size)
        self.fails = fails

    def run(self, plan):
        outputs = super().run(plan)
        for i, sample in enumerate(plan.samples):
            if self.fails(sample):
                outputs.tokens[i] = BAD_LOGITS
                if outputs.candidates is not None:
                    outputs.candidates.tokens[i] = BAD_PROCESSED
        return outputs


def run_failing(scheduler, groups, fails) -> dict:
    """The groups, in the order in which they came back, and the plans after which they did."""
    begin(scheduler, groups)
    pool, done = FailingModel(scheduler.cache.page_size, fails), {}
    while (plan := scheduler.schedule()) is not None:
        for group in scheduler.commit(plan, pool.run(plan)):
            done[group] = plan
        scheduler.check_invariants()
    assert scheduler.allocator.num_used == 0 and not scheduler.has_work
    return done


def test_samples_that_are_yet_to_come_back_are_not_computed_any_more():
    first, second = make_group(8, 12), make_group(8, 6, n=3)
    scheduler = make_scheduler(16, max_num_batched_tokens=5)
    done = run_failing(scheduler, [first, second], lambda s: s.group is second and second.num_preemptions > 0)
    assert second.num_preemptions > 0 and done[second].is_prefill
    waiting = {row.sequence for row in done[second].rows if row.group is second}
    assert len(waiting) < 3, "all samples came back in one step, so this shows nothing"
    assert {s.finish_reason for s in second.sequences} == {"error"} and first.error is None
    assert second.error is not None and second.error.startswith("the model's logits are not finite")


def test_the_sums_and_tokens_of_the_best_beam_are_kept():
    group = make_search(4, 6, 3)
    run_failing(make_scheduler(64), [group], lambda s: s.sequence.num_generated == 2)
    (best,) = group.sequences
    assert (best.finish_reason, best.num_generated) == ("error", 2) and best.cumulative_logprob < 0
    assert group.error is not None and "after 2 generated tokens" in group.error


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 8), st.integers(1, 4), st.booleans()), min_size=1, max_size=6),
    st.integers(0, 2**20), st.sampled_from([16, 30, 60]), st.sampled_from(["recompute", "swap"]), st.integers(2, 20),
)  # fmt: skip
def test_whatever_fails_leaves_the_others_and_the_pool_as_they_were(cases, seed, num_pages, preemption, budget):
    def make_groups():
        return [make_search(*case) if is_search else make_group(case[0], case[1], n=case[2])
                for *case, is_search in cases]  # fmt: skip

    def make():
        return make_scheduler(num_pages, max_num_batched_tokens=budget,
                              preemption=PreemptionConfig(preemption, swap_pages=20))  # fmt: skip

    rng = np.random.default_rng(seed)
    when = {i: (int(rng.integers(4)), int(rng.integers(6))) for i in range(len(cases)) if rng.random() < 0.5}
    try:
        expected = run_searches(make(), make_groups())
    except ValueError:  # more than the pool holds
        return
    groups = make_groups()
    places = {group: when.get(i) for i, group in enumerate(groups)}
    done = run_failing(make(), groups, lambda s: (s.sequence.sample_index, s.sequence.num_generated) == places[s.group])
    assert done.keys() == set(groups)
    for group, result in zip(groups, expected, strict=True):
        assert all(s.finish_reason is not None for s in group.sequences) or group.beams
        if group.error is None and not group.beams:
            assert [sequence.output_ids for sequence in group.sequences] == result


@pytest.mark.parametrize("kind", ["samples", "beams"])
def test_other_requests_of_the_step_that_fails_go_on(kind):
    groups = [make_search(4, 5, 2) if kind == "beams" else make_group(4, 5, n=2) for _ in range(3)]
    done = run_failing(make_scheduler(64), groups, lambda s: s.group is groups[1] and s.sequence.num_generated == 1)
    assert list(done) == [groups[1], groups[0], groups[2]]
    assert [group.error is None for group in groups] == [True, False, True]
