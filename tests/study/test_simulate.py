"""The simulator takes the engine's steps, and many steps at once are those steps."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from helpers import all_but_slow
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import TOY, beam_group, few_programs, make_group, toy_engine

from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.config import DENSE_CACHES, KV_CACHES, CacheConfig, EngineConfig, PreemptionConfig
from jaxpaged.study.simulate import PAPER_POOL, Simulation, paper_limits
from jaxpaged.study.workloads import Workload, make_workload

SWAP = PreemptionConfig("swap", swap_pages=1000)


def small_workload(count=14, seed=5, max_arrival=0) -> Workload:
    rng = np.random.default_rng(seed)
    prompts, outputs = rng.integers(1, 25, count), rng.integers(1, 25, count)
    arrivals = np.sort(rng.integers(0, max_arrival + 1, count)).astype(np.float64)
    return Workload(prompts.astype(np.int32), outputs.astype(np.int32), arrivals)


def steps_of(stats) -> dict[str, list[int]]:
    """All that is taken down a step, and what is made of it."""
    arrays = {name: values.tolist() for name, values in stats.memory.columns().items()}
    for name in ("pages_used", "logical_pages", "running", "waiting", "batch_tokens"):
        arrays[name] = getattr(stats, name).tolist()
    return arrays


def totals_of(stats) -> dict[str, int]:
    names = (
        "steps", "prefill_steps", "mixed_steps", "preemptions", "recomputed_tokens", "swap_overflows", "page_copies",
        "num_generated_tokens", "num_prompt_tokens", "num_requests",
    )  # fmt: skip
    return {name: getattr(stats, name) for name in names}


def run_engine(workload, limits: EngineConfig, cache: CacheConfig, params_of, beams=False, prefix_len=0):
    """The engine's account of the workload, and what its device chose in every step."""
    engine = toy_engine(
        cache.num_pages, cache.page_size, limits.max_num_seqs, limits.max_num_batched_tokens, limits.max_model_len,
        limits.preemption, limits.kv_cache,
    )  # fmt: skip
    few_programs(engine)
    rng = np.random.default_rng(9)
    groups = []
    prefix = rng.integers(0, TOY.vocab_size, prefix_len).tolist()
    for i, (prompt_len, output_len) in enumerate(zip(workload.prompt_lens, workload.output_lens, strict=True)):
        prompt, params = prefix + rng.integers(0, TOY.vocab_size, prompt_len).tolist(), params_of(int(output_len))
        groups.append(beam_group(prompt, params, (), str(i)) if beams else make_group(prompt, params, str(i), seed=i))
        groups[-1].prefix_len = prefix_len if limits.kv_cache == "paged" else 0
    outputs = []
    fetch = engine.runner.fetch
    engine.runner.fetch = lambda launched: outputs.append(fetch(launched)) or outputs[-1]
    for _ in engine.run(groups):
        pass
    return engine.stats, outputs


POOLS = {
    "paged": 24, "contiguous-max": 100, "contiguous-pow2": 80, "contiguous-oracle": 80, "none": 2,
    **dict.fromkeys(DENSE_CACHES, 100),
}  # fmt: skip


def budget_for(kv_cache, num_tokens=48) -> int:
    """Tokens of a step: without a cache it has all of a request, and few requests together."""
    return 200 if kv_cache == "none" else num_tokens


@pytest.mark.parametrize("preemption", [SWAP, PreemptionConfig()], ids=["swap", "recompute"])
@pytest.mark.parametrize("kv_cache", all_but_slow(KV_CACHES, "paged", "contiguous-oracle", "dense-static"))
def test_simulator_and_engine_agree_at_every_step(kv_cache, preemption):
    workload, cache = small_workload(), CacheConfig(4, POOLS[kv_cache])
    limits = EngineConfig(64, 8, budget_for(kv_cache), preemption=preemption, kv_cache=kv_cache)
    stats, _ = run_engine(workload, limits, cache, lambda n: SamplingParams(max_tokens=n, ignore_eos=True))
    simulated = Simulation(workload, cache, limits).run()
    assert steps_of(simulated) == steps_of(stats)
    assert totals_of(simulated) == totals_of(stats)
    assert stats.preemptions > 0 or kv_cache != "paged"
    assert (stats.mixed_steps > 0) == limits.can_mix_steps
    assert stats.memory.stranded.any() or kv_cache == "none"


@pytest.mark.parametrize("preemption", [SWAP, PreemptionConfig()], ids=["swap", "recompute"])
@pytest.mark.parametrize(
    ("kv_cache", "prefix_len"),
    [("paged", 32), ("paged", 50), pytest.param("contiguous-oracle", 50, marks=pytest.mark.slow)],
)
def test_they_agree_where_requests_share_a_prefix(kv_cache, prefix_len, preemption):
    """One of 50 tokens takes two steps of prefill."""
    workload, cache = small_workload(), CacheConfig(4, 36 if kv_cache == "paged" else 100)
    limits = EngineConfig(100, 8, 48, preemption=preemption, kv_cache=kv_cache)
    for num_samples in (1, 2):
        params = SamplingParams(n=num_samples, ignore_eos=True)
        stats, outputs = run_engine(
            workload, limits, cache, lambda n, p=params: dataclasses.replace(p, max_tokens=n), prefix_len=prefix_len
        )
        chosen = iter(outputs)
        simulated = Simulation(
            workload, cache, limits, num_samples, prefix_len=prefix_len, device=lambda plan, c=chosen: next(c)
        ).run()
        assert steps_of(simulated) == steps_of(stats)
        assert totals_of(simulated) == totals_of(stats)
        assert stats.preemptions > 0 or kv_cache != "paged"


@pytest.mark.parametrize("kv_cache", all_but_slow(KV_CACHES, "paged"))
def test_they_agree_for_samples_and_beams_given_what_the_device_chose(kv_cache):
    """Which beams fork, and where samples part, is in the tokens; the simulator takes the engine's."""
    workload, cache = small_workload(8), CacheConfig(4, POOLS[kv_cache] * (2 if kv_cache == "paged" else 1))
    limits = EngineConfig(64, 12, budget_for(kv_cache), preemption=SWAP, kv_cache=kv_cache)
    for kind in (dict(num_samples=3), dict(beam_width=4)):
        params = Simulation(workload, cache, limits, **kind).params
        stats, outputs = run_engine(
            workload, limits, cache, lambda n, p=params: dataclasses.replace(p, max_tokens=n), "beam_width" in kind
        )
        chosen = iter(outputs)
        simulated = Simulation(workload, cache, limits, **kind, device=lambda plan, c=chosen: next(c)).run()
        assert steps_of(simulated) == steps_of(stats), kind
        assert totals_of(simulated) == totals_of(stats), kind
        assert stats.page_copies > 0 or kv_cache == "none"


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KV_CACHES), st.sampled_from([SWAP, PreemptionConfig()]), st.integers(0, 1000), st.integers(1, 3),
    st.integers(1, 5), st.integers(0, 30), st.sampled_from([0, 40, 400]), st.sampled_from([0.0, 0.05]),
    st.sampled_from([0, 0, 7, 12]),
)  # fmt: skip
def test_many_steps_at_once_are_those_steps(
    kv_cache, preemption, seed, n, page_size, spare, spread, watermark, prefix_len
):
    workload = small_workload(10, seed, spread)
    size = 1 << (-(-64 // page_size) - 1).bit_length()
    cache = CacheConfig(page_size, n * size + 1 + spare)
    limits = EngineConfig(
        64, 6, budget_for(kv_cache, 40), watermark=watermark, preemption=preemption, kv_cache=kv_cache
    )
    at_once, one_by_one = (
        Simulation(workload, cache, limits, n, step_seconds=1.0, one_by_one=is_slow, prefix_len=prefix_len)
        for is_slow in (False, True)
    )
    fast, slow = at_once.run(), one_by_one.run()
    assert steps_of(fast) == steps_of(slow)
    assert totals_of(fast) == totals_of(slow)
    at_once.scheduler.check_invariants()


def test_steps_are_taken_at_once_and_not_planned_one_by_one():
    simulation = Simulation(make_workload("sharegpt", 50), PAPER_POOL, paper_limits("contiguous-max"))
    planned = []
    schedule = simulation.scheduler.schedule
    simulation.scheduler.schedule = lambda: planned.append(1) or schedule()
    assert simulation.run().steps > 20 * len(planned)


def test_steps_that_are_mixed_are_fewer():
    workload = make_workload("sharegpt", 150)
    steps = []
    for mixed_steps in (False, True):
        stats = Simulation(workload, PAPER_POOL, paper_limits(mixed_steps=mixed_steps)).run()
        steps.append((stats.steps, stats.prefill_steps, stats.mixed_steps))
    assert steps == [(2052, 56, 0), (2005, 139, 138)]


def test_beams_share_and_no_more_than_they_can():
    stats = Simulation(make_workload("alpaca", 40), PAPER_POOL, paper_limits(), beam_width=4).run()
    assert 0.4 < stats.memory.mean_saving < 0.75  # at most 1 - 1 / width


def test_an_idle_simulation_jumps_to_the_next_arrival():
    workload = Workload(np.array([4, 4], np.int32), np.array([3, 3], np.int32), np.array([0.0, 1e6]))
    stats = Simulation(workload, PAPER_POOL, paper_limits()).run()
    assert stats.steps == 6 and stats.running.tolist() == [1] * 6


def test_what_could_not_run_is_refused_before_anything_runs():
    workload = make_workload("fixed:1000:900", 3)
    with pytest.raises(ValueError, match="a request of 1000 and 900 tokens exceeds max_model_len=1024"):
        Simulation(workload, PAPER_POOL, paper_limits(max_model_len=1024))
    with pytest.raises(ValueError, match=r"reserves 8 chunk\(s\) of 128 pages .* holds 7"):
        Simulation(workload, PAPER_POOL, paper_limits("contiguous-max"), num_samples=8)
    with pytest.raises(ValueError, match="samples or beams"):
        Simulation(workload, PAPER_POOL, paper_limits(), num_samples=2, beam_width=2)
