"""What a trace says is what happened: tables, counts, tokens and events, under preemption in either way."""

from __future__ import annotations

import dataclasses
import json

import pytest
from scripted_device import PoolModel, make_group
from trace_replay import Replay, make_scheduler, record_random_load

from jaxpaged.config import PreemptionConfig
from jaxpaged.host.account.trace import TraceRecorder
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.host.sequence import SequenceStatus

WAYS = {
    "swap": PreemptionConfig("swap", swap_pages=1000),
    "recompute": PreemptionConfig(),
    "swap that overflows": PreemptionConfig("swap", swap_pages=10),
}


class Watch:
    """What the scheduler and its allocator held at every look, taken from them and not from the trace."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.by_frame = {}  # number of frames at the look -> what was there

    def look(self, recorder):
        scheduler = self.scheduler
        scheduler.check_invariants()
        tables = {
            recorder._live[s].index: (s.table.pages.tolist(), s.table.num_slots, s.token_ids[:])
            for group in (*filter(None, [scheduler.prefix]), *scheduler.running, *scheduler.waiting)
            for s in group.unfinished
            if s.status is SequenceStatus.RUNNING
        }
        counts = {
            page: count
            for page in range(1, scheduler.cache.num_pages)
            if (count := scheduler.allocator.ref_count(page))
        }
        self.by_frame[len(recorder.frames)] = (tables, counts, set(scheduler.allocator.known.resting))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("prefix_len, window", [(0, None), (10, None), (0, 11), (10, 5)])
def test_replaying_the_differences_gives_the_tables_and_the_allocators_counts_at_every_frame(
    way, seed, prefix_len, window
):
    scheduler = make_scheduler(num_pages=50, page_size=4, preemption=WAYS[way], window=window)
    watch = Watch(scheduler)
    recorder = record_random_load(seed, 30, scheduler, watch.look, prefix_len)
    trace = json.loads(json.dumps(recorder.trace("load")))
    replay = Replay(trace)
    assert len(trace["frames"]) == max(watch.by_frame) > 40
    for number, frame in enumerate(trace["frames"], start=1):
        replay.apply(frame)
        tables, counts, resting = watch.by_frame[number]
        assert dict(replay.ref_counts) == counts
        assert replay.cached == resting
        assert {i: table for i, table in enumerate(replay.tables) if table} == {i: t for i, (t, _, _) in tables.items()}
        for i, (_, num_slots, tokens) in tables.items():
            assert (replay.num_slots[i], replay.tokens[i]) == (num_slots, tokens)
    assert any("gone" in frame for frame in trace["frames"]) == (window is not None)
    names = {event[0] for frame in trace["frames"] for event in frame.get("events", [])}
    assert names - {"find"} == {"admit", "append", "fork", "copy", "preempt", "resume", "finish", "free", "cache"}


@pytest.mark.parametrize("way", WAYS)
def test_the_pages_of_a_shared_prefix_are_taken_once_copied_once_a_request_and_never_freed(way):
    scheduler = make_scheduler(num_pages=50, page_size=4, preemption=WAYS[way])
    trace = record_random_load(1, 30, scheduler, prefix_len=10).trace("load")
    events = [event for frame in trace["frames"] for event in frame.get("events", [])]
    assert trace["requests"][0] == {"id": "shared prefix", "kind": "sample", "width": 1, "prompt_len": 10}
    assert events[:2] == [["admit", 0], ["append", 0, 1, 2, 3]]
    assert not any(page in event[1:] for event in events if event[0] == "free" for page in (1, 2, 3))
    assert not any(page in event[2:] for event in events[2:] if event[0] == "append" for page in (1, 2, 3))
    assert sum(event[0] == "copy" and event[2] == 3 for event in events) >= 30


@pytest.mark.parametrize("way", WAYS)
def test_events_are_those_of_the_scheduler(way):
    scheduler = make_scheduler(num_pages=50, page_size=4, preemption=WAYS[way])
    copies, preempted = [], 0
    schedule = scheduler.schedule

    def counted():
        nonlocal preempted
        plan = schedule()
        copies.extend(plan.copies)
        preempted += plan.num_preempted
        return plan

    scheduler.schedule = counted
    trace = record_random_load(3, 30, scheduler).trace("load")
    events = [event for frame in trace["frames"] for event in frame.get("events", [])]
    assert [(src, dst) for name, *rest in events if name == "copy" for _, src, dst in [rest]] == copies
    assert sum(event[0] == "preempt" for event in events) == sum(event[0] == "resume" for event in events)
    assert sum(event[0] == "preempt" for event in events) == preempted > 5
    assert sum(event[0] == "admit" for event in events) == 30
    assert sum(event[0] == "finish" for event in events) == len(trace["sequences"])
    forked = {event[1] for event in events if event[0] == "fork"}
    assert len(forked) == len(trace["sequences"]) - 30
    ways = {event[2] for event in events if event[0] == "preempt"}
    assert ways == {"swap": {"swap"}, "recompute": {"recompute"}, "swap that overflows": {"swap", "recompute"}}[way]


def test_every_page_that_becomes_free_or_is_kept_is_said_to():
    scheduler = make_scheduler(num_pages=50, page_size=4, preemption=WAYS["recompute"])
    trace = record_random_load(4, 20, scheduler).trace("load")
    replay, before = Replay(trace), set()
    for frame in trace["frames"]:
        replay.apply(frame)
        held = set(replay.ref_counts)
        events = frame.get("events", [])
        freed, kept = (
            {page for name, *pages in events if name == kind for page in pages} for kind in ("free", "cache")
        )
        assert kept == (before - held) & replay.cached
        assert freed >= before - held - replay.cached and not freed & (held | replay.cached)
        before = held
    assert not before and replay.cached


def test_who_waits_for_the_end_of_a_static_batch_has_finished_in_the_trace():
    plain = make_scheduler(num_pages=200, page_size=4, preemption=WAYS["recompute"])
    scheduler = Scheduler(plain.cache, dataclasses.replace(plain.limits, kv_cache="dense-static"))
    scheduler.add(make_group(3, 1))
    scheduler.add(make_group(3, 3))
    recorder, pool = TraceRecorder(scheduler.cache), PoolModel(4)
    while (plan := scheduler.schedule()) is not None:
        recorder.planned(plan, scheduler)
        scheduler.commit(plan, pool.run(plan))
        recorder.committed(scheduler)
    ends = [(frame["step"], *event[1:]) for frame in recorder.frames for event in frame["events"] if "finish" in event]
    assert ends == [(1, 0, "length"), (3, 1, "length")]


def test_pages_that_a_later_request_finds_are_cached_until_then_and_found_by_it():
    scheduler = make_scheduler(num_pages=20, page_size=4, preemption=WAYS["recompute"])
    recorder, pool = TraceRecorder(scheduler.cache), PoolModel(4)
    frames = []
    for _ in range(2):  # the same prompt of 9 tokens, one after the other: two full pages
        scheduler.add(make_group(9, 1))
        while (plan := scheduler.schedule()) is not None:
            recorder.planned(plan, scheduler)
            scheduler.commit(plan, pool.run(plan))
            recorder.committed(scheduler)
        frames.append(len(recorder.frames))
    first, second = recorder.frames[: frames[0]], recorder.frames[frames[0] :]
    assert [frame["cached"] for frame in first if frame["cached"]] == [[1, 2]]
    assert ["cache", 1, 2] in first[-1]["events"] and ["free", 3] in first[-1]["events"]
    assert second[0]["uncached"] == [1, 2]
    assert second[0]["events"] == [["admit", 1], ["find", 1, 1, 2], ["append", 1, 3]]
    assert second[-1]["cached"] == [1, 2]


def test_what_was_known_before_the_run_is_in_its_trace_and_found():
    scheduler = make_scheduler(num_pages=20, page_size=4, preemption=WAYS["recompute"])
    pool = PoolModel(4)

    def run(recorder=None):
        scheduler.add(make_group(9, 1))
        while (plan := scheduler.schedule()) is not None:
            if recorder:
                recorder.planned(plan, scheduler)
            scheduler.commit(plan, pool.run(plan))
            if recorder:
                recorder.committed(scheduler)

    run()
    recorder = TraceRecorder(scheduler.cache)
    recorder.begin(scheduler)
    run(recorder)
    trace = recorder.trace("the same again")
    assert trace["cached"] == [1, 2]
    assert trace["frames"][0]["events"] == [["admit", 0], ["find", 0, 1, 2], ["append", 0, 3]]
