"""A pool that holds the largest group and nothing more: every request ends with the tokens of an endless pool, in
whichever way groups give way; what that took is counted; what swapping takes of the device is accounted for."""

from __future__ import annotations

import dataclasses
import logging
from typing import NamedTuple

import jax
import numpy as np
import pytest
from helpers import all_but_slow
from scripted_device import most_pages_of
from toy import TOY, beam_group, few_programs, make_group, random_prompts, run_checked, toy_engine

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.config import CacheConfig, EngineConfig, ModelConfig, PreemptionConfig
from jaxpaged.device import steps, swap
from jaxpaged.device.cache import make_paged_cache
from jaxpaged.engine import preemption
from jaxpaged.engine.preemption import flops_per_token, resolve_preemption
from jaxpaged.host.step.batching import split

PAGE_SIZE = 4
PAGE_BYTES = PAGE_SIZE * TOY.kv_bytes_per_token(4)


def mixed_load(count=40) -> list:
    """Beams of width 2 to 8, samples with n of 1 to 8, and greedy requests."""
    groups = []
    for i, prompt in enumerate(random_prompts(count, low=2, high=16, seed=5)):
        max_tokens = 24 + 7 * i % 16
        if i % 3 == 0:
            params = BeamSearchParams(beam_width=2 + i // 3 % 7, max_tokens=max_tokens)
            groups.append(beam_group(prompt, params, (31, 94), str(i)))
        elif i % 3 == 1:
            params = SamplingParams(n=1 + i // 3 % 8, max_tokens=max_tokens)
            groups.append(make_group(prompt, params, str(i), seed=i))
        else:
            groups.append(make_group(prompt, SamplingParams(temperature=0, max_tokens=max_tokens), str(i)))
    return groups


def tight_engine(way: PreemptionConfig):
    largest = most_pages_of(mixed_load(), page_size=4)
    return few_programs(toy_engine(num_pages=1 + largest, max_num_seqs=64, preemption=way))


@pytest.fixture(scope="module")
def expected():
    engine = few_programs(toy_engine(num_pages=4000, max_num_seqs=64))
    results = run_checked(engine, mixed_load())
    assert engine.stats.preemptions == 0 and len(results) == 40
    return results


WAYS = {
    "swap": PreemptionConfig("swap", swap_pages=1000, transfer_pages=16),
    "recompute": PreemptionConfig(),
    "auto": PreemptionConfig("auto", swap_pages=1000, page_cost=3.4, transfer_pages=16),
    "swap that overflows": PreemptionConfig("swap", swap_pages=12, transfer_pages=16),
}


@pytest.mark.parametrize("name", all_but_slow(WAYS, "swap", "recompute"))
def test_a_tight_pool_gives_the_tokens_of_an_endless_one(expected, name):
    engine = tight_engine(WAYS[name])
    groups = mixed_load()
    assert run_checked(engine, groups) == expected
    stats = engine.stats
    assert stats.preemptions == sum(group.num_preemptions for group in groups) > 40
    assert stats.swaps_out == stats.swaps_in == sum(group.num_swaps for group in groups)
    assert stats.swapped_out_bytes == stats.swapped_in_bytes
    assert stats.recomputed_tokens == sum(group.recomputed_tokens for group in groups)
    assert (stats.swaps_out > 0) == (stats.seconds["swap"] > 0) == (stats.swapped_out_bytes > 0) == (name in SWAPS)
    assert (stats.recomputed_tokens > 0) == (stats.seconds["recompute"] > 0) == (name != "swap")
    assert (stats.swap_overflows > 0) == (name == "swap that overflows")
    assert 0 < stats.seconds["swap"] + stats.seconds["recompute"] < stats.seconds["device"]


SWAPS = {"swap", "auto", "swap that overflows"}


def test_bytes_are_counted_by_the_page_each_once():
    engine = toy_engine(num_pages=17, preemption=WAYS["swap"])
    groups = [
        make_group(list(range(1, 17)), SamplingParams(temperature=0, max_tokens=40), "0"),
        make_group(list(range(2, 18)), SamplingParams(n=4, max_tokens=9), "1"),
    ]
    run_checked(engine, groups)
    assert groups[1].num_swaps == engine.stats.swaps_out == 1
    # At most four pages of the prompt, shared by all samples, and two or three of each sample's own; not 4 * 6.
    num_pages, rest = divmod(engine.stats.swapped_out_bytes, PAGE_BYTES)
    assert rest == 0 and 4 + 4 <= num_pages <= 4 + 4 * 2


def test_leaving_a_run_while_groups_are_swapped_out_leaves_the_engine_clean(expected):
    engine = tight_engine(WAYS["swap"])
    results = engine.run(mixed_load())
    while not engine.runner._swapped:
        next(results)
    results.close()
    assert not engine.runner._swapped and engine.scheduler.swap_space.num_free == 1000
    assert run_checked(engine, mixed_load()) == expected
    assert not engine.runner._swapped and engine.stats.swaps_out > 0


@pytest.mark.slow
def test_nothing_is_compiled_after_warm_up_when_groups_swap():
    engine = toy_engine(num_pages=40, max_num_seqs=8, preemption=dataclasses.replace(WAYS["swap"], transfer_pages=7))
    params = SamplingParams(n=3, max_tokens=30)
    groups = [make_group(prompt, params, str(i), seed=i) for i, prompt in enumerate(random_prompts(6, seed=3))]
    engine.warm_up(groups)
    run_checked(engine, groups)
    assert engine.stats.swaps_out > 0 and engine.stats.programs_made == 0


# The device's side


def random_pool(num_pages=50):
    rng = np.random.default_rng(0)
    pool = make_paged_cache(TOY, CacheConfig(PAGE_SIZE, num_pages, "float32"))
    return jax.tree.map(lambda leaf: jax.numpy.asarray(rng.normal(size=leaf.shape).astype(np.float32)), pool)


def test_pages_come_back_bit_for_bit_in_every_layer_and_nothing_else_changes():
    device = jax.devices()[0]
    pool = random_pool()
    before = [np.array(leaf) for leaf in (*pool.k, *pool.v)]
    taken, given = np.arange(3, 26, dtype=np.int32), np.arange(27, 50, dtype=np.int32)[::-1].copy()
    host = swap.host_memory(device)
    fetched = swap.fetch_pages(pool, taken, split(23, (1, 4, 16)), host, device)
    assert [pages.shape[:2] for pages in fetched] == [(4, 16), (4, 4), (4, 1), (4, 1), (4, 1)]
    assert {pages.sharding for pages in fetched} == {host}
    pool = swap.restore_pages(pool, given, fetched, device)
    for old, new in zip(before, (*pool.k, *pool.v), strict=True):
        np.testing.assert_array_equal(new[given], old[taken])
        np.testing.assert_array_equal(new[:27], old[:27])


def test_groups_swap_through_another_kind_of_memory(expected, monkeypatch):
    """As on a GPU: a CPU has pinned memory as a kind of its own, too."""
    device = jax.devices()[0]
    if "pinned_host" not in [memory.kind for memory in device.addressable_memories()]:
        pytest.skip("no memory of kind pinned_host here")
    pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    monkeypatch.setattr(swap, "host_memory", lambda _: pinned)
    fetched = []
    monkeypatch.setattr(swap, "fetch_pages", lambda *args: fetched.append(fetch_pages(*args)) or fetched[-1])
    assert run_checked(tight_engine(WAYS["swap"]), mixed_load()) == expected
    assert {pages.sharding for swapped in fetched for pages in swapped} == {pinned}


fetch_pages = swap.fetch_pages


def test_the_pool_is_updated_in_place_and_a_transfer_takes_what_is_accounted_for():
    num_pages, size = 2000, 16
    pool = make_paged_cache(TOY, CacheConfig(PAGE_SIZE, num_pages, "float32"))
    page_ids = np.arange(1, 1 + size, dtype=np.int32)
    gather = steps.gather_pages.lower(pool, page_ids).compile().memory_analysis()
    pages = steps.gather_pages(pool, page_ids)
    scatter = steps.scatter_pages.lower(pool, page_ids, pages).compile().memory_analysis()
    assert scatter.alias_size_in_bytes == num_pages * PAGE_BYTES
    most = swap.transfer_bytes(size, PAGE_BYTES) - size * PAGE_BYTES + 4096  # without the other one; ids and the like
    assert gather.output_size_in_bytes + gather.temp_size_in_bytes <= most
    assert scatter.temp_size_in_bytes + pages.nbytes <= most


def test_sizes_of_transfers_add_up_to_the_pages():
    assert split(0, (1, 4, 16)) == []
    assert split(39, (1, 4, 16)) == [16, 16, 4, 1, 1, 1]
    for count in range(200):
        assert sum(split(count, (1, 4, 16, 40))) == count


# What is settled before


@pytest.fixture
def reserved(monkeypatch):
    """Arguments of every call that would pin memory; `None` in it: the machine has none to give."""
    calls = []

    def reserve(num_bytes, bytes_a_transfer, device):
        if None in calls:
            raise ValueError("cannot be pinned")
        calls.append((num_bytes, bytes_a_transfer))

    monkeypatch.setattr(preemption, "reserve", reserve)
    return calls


def settled(way: PreemptionConfig, num_pages: int) -> PreemptionConfig:
    """For four sequences of up to 128 tokens, 32 pages each."""
    limits = EngineConfig(max_model_len=128, max_num_seqs=4, preemption=way)
    cache = CacheConfig(PAGE_SIZE, num_pages, "float32")
    return preemption.reserve_swap_space(limits, cache, TOY, jax.devices()[0]).preemption


def test_no_host_memory_is_taken_where_nothing_can_ever_swap(reserved):
    assert settled(WAYS["swap"], num_pages=1 + 4 * 32) == PreemptionConfig()
    assert settled(WAYS["recompute"], num_pages=10) == PreemptionConfig()
    assert not reserved


def test_no_more_host_memory_is_taken_than_what_runs_could_fill(reserved):
    assert settled(WAYS["swap"], num_pages=4 * 32).swap_pages == 4 * 32
    assert settled(WAYS["swap that overflows"], num_pages=4 * 32) == WAYS["swap that overflows"]
    assert reserved == [(128 * PAGE_BYTES, 16 * PAGE_BYTES), (12 * PAGE_BYTES, 16 * PAGE_BYTES)]


def test_without_host_memory_to_pin_auto_recomputes_and_says_so_and_swap_is_refused(reserved, caplog):
    reserved.append(None)
    assert settled(WAYS["auto"], num_pages=40) == PreemptionConfig()
    assert "'auto' is 'recompute': cannot be pinned" in caplog.text
    with pytest.raises(ValueError, match="cannot be pinned"):
        settled(WAYS["swap"], num_pages=40)


def test_memory_that_cannot_be_pinned_is_an_error_with_the_numbers(monkeypatch):
    def is_full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of host memory")

    device = jax.devices()[0]
    monkeypatch.setattr(swap, "host_memory", lambda _: PinnedMemory("pinned_host"))
    monkeypatch.setattr(jax, "device_put", is_full)
    with pytest.raises(ValueError, match="2.00 GiB of host memory for swapped pages cannot be pinned: lower swap_sp"):
        swap.reserve(2 << 30, 1024, device)


class PinnedMemory(NamedTuple):
    memory_kind: str


LLAMA_8B = ModelConfig(
    "llama", 128256, 4096, 14336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
    max_position_embeddings=131072,
)  # fmt: skip


def test_the_cost_of_a_page_is_in_tokens_that_could_be_computed_meanwhile():
    way = resolve_preemption("auto", 4.0, LLAMA_8B, page_size=16, itemsize=2, platform="gpu")
    assert (way.mode, way.swap_pages, way.transfer_pages) == ("auto", 2048, 32)  # 2 MiB a page
    assert flops_per_token(LLAMA_8B) == pytest.approx(13.96e9, rel=1e-3)
    assert way.page_cost == pytest.approx(2 * 2**21 * 1e4 / 13.96e9, rel=1e-3)
    on_cpu = resolve_preemption("auto", 4.0, LLAMA_8B, page_size=16, itemsize=2, platform="cpu")
    assert on_cpu.page_cost == pytest.approx(way.page_cost * 30 / 1e4)


def test_auto_is_recompute_where_no_group_would_swap(caplog):
    caplog.set_level(logging.INFO, "jaxpaged")
    assert resolve_preemption("auto", 4.0, TOY, 16, 4, "gpu") == PreemptionConfig()
    assert "'auto' is 'recompute': moving a page of 16 tokens costs as much as computing" in caplog.text
    assert resolve_preemption("auto", 0, LLAMA_8B, 16, 2, "gpu") == PreemptionConfig()
    assert "there is no swap space" in caplog.text
    assert resolve_preemption("swap", 1.0, TOY, 16, 4, "gpu").mode == "swap"  # as asked


def test_swap_space_smaller_than_a_page_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match="at least one page of 2097152 bytes, but swap_space_gib=0.001 holds none"):
        resolve_preemption("swap", 0.001, LLAMA_8B, 16, 2, "gpu")
