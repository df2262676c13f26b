"""Replays by measured step times: lines between points, and many steps at once are those steps, to the last bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpaged.config import DENSE_CACHES, CacheConfig, EngineConfig, ModelConfig, PreemptionConfig
from jaxpaged.host.step.batching import Buckets
from jaxpaged.study.simulate import Simulation
from jaxpaged.study.step_table import Line, StepTable, name_of, padding_from, padding_of
from jaxpaged.study.workloads import Workload

SYSTEMS = ("paged", "contiguous-max", "contiguous-oracle", *DENSE_CACHES)
SWAP = PreemptionConfig("swap", swap_pages=1000)


def point(name, step, rows, tokens, seconds):
    return {"name": name, "step": step, "rows": rows, "tokens": tokens, "seconds": seconds}


def write_table(path, **changes):
    """Unlike any device: a decode step takes 1 s a row, and 0.01 s a token of KV; a prefill step 0.1 s a token."""
    points = [
        point(name, "decode", rows, tokens, 1.0 * rows + 0.01 * tokens)
        for name in ("paged-4", "dense", "paged-4-samples")
        for rows in (1, 8)
        for tokens in (10, 20, 100)
    ]
    points += [point(name, "prefill", 1, tokens, 0.1 * tokens) for name in ("paged-4", "dense") for tokens in (10, 20)]
    values = {
        "device": "none",
        "copies": [[1, 0.5], [3, 0.7]],
        "swaps": [[1, 0.25, 0.125]],
        "points": points,
        **changes,
    }
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def table(tmp_path):
    return StepTable.read(write_table(tmp_path / "table.json"))


def limits_for(kv_cache, preemption=SWAP):
    return EngineConfig(
        64, 8, 48, preemption=preemption if kv_cache == "paged" else PreemptionConfig(), kv_cache=kv_cache
    )


def test_a_line_goes_through_its_points_and_on():
    line = Line.through([(10, 1.0), (20, 3.0), (20, 5.0), (40, 4.0)])  # 4 at 20, on average
    assert line.at(np.array([0.0, 10, 15, 20, 30, 60])).tolist() == [-2.0, 1.0, 2.5, 4.0, 4.0, 4.0]
    assert Line.through([(5, 2.0)]).at(np.array([0.0, 9.0])).tolist() == [2.0, 2.0]


def test_a_request_alone_takes_what_its_steps_take(table):
    """Prompt of 6: one prefill step, padded to 48 tokens; then steps of one row that read 7, 8, 9 tokens."""
    cache, limits = CacheConfig(4, 24), limits_for("paged")
    workload = Workload(np.array([6], np.int32), np.array([4], np.int32), np.array([2.0]))
    simulation = Simulation(workload, cache, limits, step_seconds=table.clock(limits, cache))
    simulation.run()
    assert simulation.first_token_times.tolist() == [pytest.approx(2 + 4.8)]
    assert simulation.finished_times.tolist() == [pytest.approx(2 + 4.8 + 3 * 1 + 0.01 * (7 + 8 + 9))]


def test_rows_between_those_that_were_measured_lie_between(table):
    """Two requests are padded to 2 rows: a seventh of the way from 1 to 8."""
    cache, limits = CacheConfig(4, 24), limits_for("paged")
    workload = Workload(np.full(2, 6, np.int32), np.full(2, 2, np.int32), np.zeros(2))
    simulation = Simulation(workload, cache, limits, step_seconds=table.clock(limits, cache))
    simulation.run()
    assert simulation.now == pytest.approx(4.8 + 2 + 0.01 * 14)


def test_a_mixed_step_takes_a_prefill_of_all_its_tokens_and_what_decoding_reads(table):
    """The second request comes while the first is prefilled: then 48 padded tokens of its prompt, and 8 padded rows, of
    which one reads 7 tokens of KV. Where steps alternate, the first waits meanwhile."""
    cache, workload = CacheConfig(4, 24), Workload(np.full(2, 6, np.int32), np.full(2, 2, np.int32), np.array([0.0, 1]))
    finished = {}
    for mixed_steps in (True, False):
        limits = EngineConfig(64, 8, 48, mixed_steps=mixed_steps)
        simulation = Simulation(workload, cache, limits, step_seconds=table.clock(limits, cache))
        assert simulation.run().mixed_steps == mixed_steps
        finished[mixed_steps] = simulation.finished_times.tolist()
    mixed = 4.8 + 0.1 * (48 + 8) + 0.01 * 7
    assert finished[True] == [pytest.approx(mixed), pytest.approx(mixed + 1 + 0.01 * 7)]
    assert finished[False] == [pytest.approx(4.8 + 4.8 + 2 + 0.01 * 14)] * 2


def test_copies_and_swaps_take_their_time(table):
    """Two samples of a prompt of 6 share its second page: one copies it."""
    cache, limits = CacheConfig(4, 24), limits_for("paged")
    workload = Workload(np.array([6], np.int32), np.array([2], np.int32), np.zeros(1))
    simulation = Simulation(workload, cache, limits, 2, step_seconds=table.clock(limits, cache, "samples"))
    simulation.run()
    assert simulation.now == pytest.approx(4.8 + 2 + 0.01 * 14 + 0.5)

    workload = Workload(np.full(6, 12, np.int32), np.full(6, 30, np.int32), np.zeros(6))
    seconds = {}
    for swap_costs in (0.0, 1000.0):
        dear = StepTable(table.points, table.copies, ((1, swap_costs, swap_costs),), table.facts)
        simulation = Simulation(workload, cache, limits, step_seconds=dear.clock(limits, cache))
        stats = simulation.run()

        seconds[swap_costs] = simulation.now
    assert stats.preemptions > 0
    assert seconds[1000.0] - seconds[0.0] > 1000 * stats.preemptions


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SYSTEMS), st.sampled_from([SWAP, PreemptionConfig()]), st.integers(0, 1000), st.integers(1, 2),
    st.integers(0, 30), st.sampled_from([0.0, 0.05, 0.5, 5.0]),
)  # fmt: skip
def test_times_of_many_steps_at_once_are_those_of_each(kv_cache, preemption, seed, n, spare, rate):
    rng = np.random.default_rng(seed)
    lens = [rng.integers(1, 25, 12).astype(np.int32) for _ in range(2)]
    workload = Workload(*lens, np.cumsum(rng.exponential(1 / rate, 12)) if rate else np.zeros(12))
    cache, limits = CacheConfig(4, n * 16 + 1 + spare), limits_for(kv_cache, preemption)

    def clock(plan, num_steps):  # of nothing that is exact in binary
        read = sum(row.start + row.count for row in plan.rows) + len(plan.rows) * np.arange(num_steps)
        times = 0.1 + read / 300
        times[0] += 0.01 * len(plan.copies) + 0.07 * len(plan.swaps)
        return times

    fast, slow = (
        Simulation(workload, cache, limits, n, step_seconds=clock, one_by_one=one_by_one)
        for one_by_one in (False, True)
    )
    assert fast.run().steps == slow.run().steps
    assert fast.finished_times.tolist() == slow.finished_times.tolist()
    assert fast.first_token_times.tolist() == slow.first_token_times.tolist()
    assert fast.stats.step_times.tolist() == slow.stats.step_times.tolist()
    assert (fast.finished_times >= fast.first_token_times).all() and (fast.first_token_times > workload.arrivals).all()


def test_a_request_is_queued_at_the_first_step_that_starts_after_it_came(table):
    """The second request comes in the middle of a stretch of steps of one second each, and is prefilled at its end."""
    cache, limits = CacheConfig(4, 24), limits_for("paged")
    workload = Workload(np.array([4, 4], np.int32), np.array([20, 2], np.int32), np.array([0.0, 7.5]))
    simulation = Simulation(workload, cache, limits, step_seconds=1.0)
    stats = simulation.run()
    assert simulation.first_token_times.tolist() == [1.0, 9.0]  # its step starts at 8
    assert stats.step_times[0].tolist() == list(range(stats.steps))


def test_a_system_that_was_not_measured_is_refused(table):
    with pytest.raises(ValueError, match="no decode steps of 'paged-16'; they have paged-4, dense, paged-4-samples"):
        table.clock(EngineConfig(64), CacheConfig(16, 24))
    with pytest.raises(ValueError, match="kv_cache='none' has no step times"):
        table.clock(EngineConfig(64, kv_cache="none"), CacheConfig(4, 24))


def test_a_file_that_is_no_table_is_refused(tmp_path):
    path = tmp_path / "table.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="table.json is not JSON"):
        StepTable.read(path)
    path.write_text('{"results": []}')
    with pytest.raises(ValueError, match="has no step times"):
        StepTable.read(path)
    with pytest.raises(ValueError, match="point 0: seconds must be of type float: None"):
        StepTable.read(write_table(path, points=[{"name": "dense", "step": "decode", "rows": 1, "tokens": 1}]))


def test_times_of_another_model_are_refused(tmp_path):
    model = ModelConfig("opt", 64, 32, 48, 2, 4, 4, 8, 64)
    shape = {**model.to_dict(), "num_layers": 3}
    table = StepTable.read(write_table(tmp_path / "table.json", model="other", model_shape=shape))
    with pytest.raises(ValueError, match="of other, another model: its num_layers is 3, not 2"):
        table.check_model(model)


def test_padding_survives_a_file():
    buckets = Buckets.for_limits(EngineConfig(2048), CacheConfig(16, 984))
    assert padding_from(json.loads(json.dumps(padding_of(buckets)))) == buckets


def test_pages_that_are_reserved_are_read_as_pages():
    assert name_of("contiguous-oracle", 16) == name_of("paged", 16) == "paged-16"
    assert name_of("dense-static", 16) == "dense" and name_of("paged", 16, "beams") == "paged-16-beams"
