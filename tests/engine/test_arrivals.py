"""Requests that come over time: queued when their time has come, and timed from then on."""

from __future__ import annotations

import pytest
from toy import make_group, random_prompts, run_tokens, toy_engine

from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.host.arrivals import Arrivals, set_arrivals

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def groups_at(times):
    groups = [make_group(prompt, GREEDY, str(i)) for i, prompt in enumerate(random_prompts(len(times)))]
    set_arrivals(groups, times)
    return groups


def ids(groups):
    return [group.request_id for group in groups]


def test_groups_are_taken_when_their_time_has_come_in_the_order_of_times():
    arrivals = Arrivals(groups_at([2.0, 0.0, 1.0, 1.0]))
    assert ids(arrivals.take(0.0)) == ["1"]
    assert arrivals.seconds_to_next(0.25) == 0.75
    assert ids(arrivals.take(0.9)) == []
    assert ids(arrivals.take(1.0)) == ["2", "3"]
    assert arrivals and ids(arrivals.take(5.0)) == ["0"]
    assert not arrivals


@pytest.mark.parametrize(
    "times, message",
    [
        ([0.0], "1 arrival_times for 2 prompts"),
        ([0.0, -1.0], "got -1.0"),
        ([0.0, float("nan")], "got nan"),
        ([float("inf"), 0.0], "got inf"),
    ],
)
def test_times_that_cannot_be_are_refused(times, message):
    with pytest.raises(ValueError, match=message):
        set_arrivals(groups_at([0.0, 0.0]), times)


def test_the_engine_starts_no_group_before_its_arrival_and_changes_no_token():
    engine = toy_engine()
    expected = run_tokens(engine, groups_at([0.0, 0.0, 0.0]))
    groups = groups_at([0.3, 0.2, 0.3])
    tokens = {}
    for group in engine.run(groups):
        tokens[group.request_id] = [sequence.output_ids for sequence in group.sequences]
        assert group.arrival_time <= group.first_scheduled_time <= group.first_token_time <= group.finished_time
    assert tokens == expected
    begins, ends = engine.stats.step_times
    assert len(begins) == engine.stats.steps
    assert (begins <= ends).all() and (begins[1:] >= ends[:-1]).all()
    assert engine.stats.steps_after_pauses[0] == 0 and begins[0] >= 0.2
    assert groups[0].first_scheduled_time >= 0.3


def test_a_group_that_cannot_run_is_refused_before_any_runs_though_it_comes_later():
    engine = toy_engine(num_pages=8, page_size=4)
    groups = groups_at([0.0, 60.0])
    groups[1] = make_group(list(range(40)), GREEDY, "1")
    groups[1].arrival_time = 60.0
    with pytest.raises(ValueError, match="the pool has 7"):
        next(engine.run(groups))
    assert engine.stats.steps == 0
