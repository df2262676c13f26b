"""Contiguous reservations: where chunks lie, what a fork copies, and that nothing but memory differs from paging."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_device import make_group, run_all
from toy import beam_group, random_prompts, toy_engine
from toy import make_group as make_toy_group

from jaxpaged import LLM
from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.config import KV_CACHES, CacheConfig, EngineConfig, EngineOptions
from jaxpaged.host.account.memory_account import CATEGORIES
from jaxpaged.host.beams.beam_state import best_hypotheses
from jaxpaged.host.pages.page_allocator import OutOfPagesError
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.host.systems.buddy_allocator import BuddyAllocator, chunk_pages_for

CONTIGUOUS = [name for name in KV_CACHES if name.startswith("contiguous")]


def make_scheduler(kv_cache, num_pages=65, page_size=2, max_model_len=32, **limits) -> Scheduler:
    return Scheduler(
        CacheConfig(page_size, num_pages), EngineConfig(max_model_len, kv_cache=kv_cache, watermark=0.0, **limits)
    )


def test_the_pool_of_the_paper_is_cut_into_seven_chunks_and_a_tail():
    buddy = BuddyAllocator(984, 16, max_chunk=128)
    assert [buddy.allocate_chunk(128) for _ in range(7)] == [769, 641, 513, 385, 257, 129, 1]
    assert buddy.num_free == 87 and buddy.largest_free == 64
    with pytest.raises(OutOfPagesError, match="no 128 pages in a row are free"):
        buddy.allocate_chunk(128)
    assert [buddy.capacity(size) for size in (128, 64, 32, 16, 1)] == [7, 15, 30, 61, 983]


def test_the_smallest_chunk_is_halved_and_halves_join_again():
    buddy = BuddyAllocator(17, 16, max_chunk=16)
    first, second = buddy.allocate_chunk(4), buddy.allocate_chunk(4)
    assert (first, second) == (1, 5) and buddy.largest_free == 8
    buddy.release_chunk(first)
    assert buddy.largest_free == 8
    buddy.release_chunk(second)
    assert buddy.largest_free == 16


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=60))
def test_chunks_partition_the_pool_after_any_program(num_usable, program):
    buddy = BuddyAllocator(num_usable + 1, 16, max_chunk=16)
    held: list[int] = []
    for is_release, number in program:
        if is_release and held:
            buddy.release_chunk(held.pop(number % len(held)))
        else:
            try:
                held.append(buddy.allocate_chunk(1 << number % 5))
            except OutOfPagesError:
                assert buddy.largest_free < 1 << number % 5
        buddy.check_invariants()
    for first_page in held:
        buddy.release_chunk(first_page)
    buddy.check_invariants()
    assert buddy.num_used == 0 and all(buddy.capacity(1 << i) == num_usable >> i for i in range(5))


@pytest.mark.parametrize(
    ("kv_cache", "pages"),  # of a prompt of 5 tokens with 9 to come, 2 tokens a page
    [("contiguous-max", 16), ("contiguous-pow2", 16), ("contiguous-oracle", 8)],
)
def test_a_request_reserves_its_estimate_rounded_up_to_a_power_of_two(kv_cache, pages):
    scheduler = make_scheduler(kv_cache)
    scheduler.add(make_group(5, 9))
    scheduler.schedule()
    assert scheduler.allocator.num_used == pages


def test_an_exact_power_of_two_is_not_rounded_up_further():
    policy = make_scheduler("contiguous-pow2").policy
    assert [policy.num_requested_for(3, 3 + output) for output in (1, 7, 8, 9, 25)] == [4, 11, 11, 19, 32]
    assert [chunk_pages_for(pages) for pages in (1, 2, 3, 4, 5, 127)] == [1, 2, 4, 4, 8, 128]


@pytest.mark.parametrize("kv_cache", CONTIGUOUS)
def test_samples_copy_the_whole_prompt_and_share_nothing(kv_cache):
    group = make_group(5, 4, n=4)
    outputs, plans = run_all(make_scheduler(kv_cache), [group])
    assert [len(plan.copies) for plan in plans] == [0, 9, 0, 0]  # three pages to each of three chunks
    assert group.pages.copied == 9 and group.pages.most_shared == 0
    assert len({tuple(tokens) for tokens in outputs[group.request_id]}) == 4


@pytest.mark.parametrize(
    ("kv_cache", "together"), [("contiguous-max", 2), ("contiguous-pow2", 2), ("contiguous-oracle", 4)]
)
def test_nobody_is_preempted_and_the_queue_waits_for_a_chunk(kv_cache, together):
    groups = [make_group(4, 12) for _ in range(6)]
    outputs, plans = run_all(make_scheduler(kv_cache, num_pages=33), groups)
    assert not any(plan.num_preempted for plan in plans) and len(outputs) == 6
    assert max(len(plan.rows) for plan in plans) == together


def test_a_request_that_no_chunk_holds_is_refused_with_the_numbers():
    scheduler = make_scheduler("contiguous-max", num_pages=20)
    scheduler.add(make_group(3, 4))
    with pytest.raises(
        ValueError, match=r"reserves 2 chunk\(s\) of 16 pages in a row \(32 tokens each\), and the empty pool of 19"
    ):
        scheduler.add(make_group(3, 4, n=2))


requests = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4)), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CONTIGUOUS), requests, st.integers(1, 5), st.integers(0, 40), st.integers(1, 40))
def test_every_request_finishes_with_the_tokens_of_an_endless_pool(kv_cache, requests, page_size, spare, budget):
    """`run_all` holds the reserved tables to a model of the pool, which sees a fork that was not copied in time."""
    groups = [make_group(*request) for request in requests]
    size = chunk_pages_for(-(-32 // page_size))
    scheduler = make_scheduler(kv_cache, 4 * size + 1 + spare, page_size, max_num_seqs=6, max_num_batched_tokens=budget)
    outputs, _ = run_all(scheduler, groups)
    for group, (prompt_len, max_tokens, n) in zip(groups, requests, strict=True):
        for i, tokens in enumerate(outputs[group.request_id]):
            assert tokens == [1 + (31 * i + prompt_len + t) % 900 for t in range(max_tokens)]
        assert len(outputs[group.request_id]) == n


def toy_groups():
    groups = []
    for i, prompt in enumerate(random_prompts(10, low=3, high=25, seed=4)):
        if i % 3 == 0:
            groups_of_beams = dict(num_beam_groups=2, diversity_penalty=0.5) if i else {}
            beams = BeamSearchParams(beam_width=4, max_tokens=20, **groups_of_beams)
            groups.append(beam_group(prompt, beams, (31,), str(i)))
        else:
            params = SamplingParams(n=3, max_tokens=20) if i % 3 == 1 else SamplingParams(temperature=0)
            groups.append(make_toy_group(prompt, params, str(i), seed=i, max_model_len=64))
    return groups


def toy_results(kv_cache):
    budget = 512 if kv_cache == "none" else 64  # without a cache a step has all tokens of its sequences, uncut
    engine = toy_engine(num_pages=150, page_size=4, max_num_batched_tokens=budget, max_model_len=64, kv_cache=kv_cache)
    results = {}
    for group in engine.run(toy_groups()):
        results[group.request_id] = (
            [(h.token_ids, round(h.score, 3)) for h in best_hypotheses(group.beams, 99)]
            if group.beams
            else [sequence.output_ids for sequence in group.sequences]
        )
        engine.scheduler.check_invariants()
    return results, engine.stats


@pytest.mark.slow
def test_all_systems_give_the_same_tokens_samples_and_beams_included():
    expected, paged = toy_results("paged")
    assert paged.preemptions == 0
    for kv_cache in KV_CACHES[1:]:
        results, stats = toy_results(kv_cache)
        assert results == expected, kv_cache
        assert stats.preemptions == 0
        assert stats.page_copies > paged.page_copies or kv_cache == "none"
        memory = stats.memory
        assert (sum(getattr(memory, name) for name in CATEGORIES) == memory.num_slots).all(), kv_cache
        assert memory.used.any() == (kv_cache != "none")


def test_unknown_systems_are_refused_with_the_list_of_known_ones(tmp_path):
    known = (
        "choose one of paged, contiguous-max, contiguous-pow2, contiguous-oracle, dense, dense-static, "
        "dense-static-global, none"
    )
    with pytest.raises(ValueError, match=f"kv_cache='slabs'; {known}"):
        LLM(tmp_path, kv_cache="slabs")
    with pytest.raises(ValueError, match=f"kv_cache is 'slabs'; {known}"):
        EngineConfig(100, kv_cache="slabs")
    with pytest.raises(ValueError, match="preemption='swap' needs kv_cache='paged'"):
        EngineOptions(kv_cache="contiguous-max", preemption="swap")


def test_a_system_of_another_name_before_is_answered_with_its_name_now():
    with pytest.raises(ValueError, match=r"kv_cache='dense-slots'; it is called 'dense' now$"):
        EngineOptions(kv_cache="dense-slots")
    with pytest.raises(ValueError, match=r"kv_cache is 'dense-slots'; it is called 'dense' now$"):
        EngineConfig(100, kv_cache="dense-slots")
    with pytest.raises(ValueError, match=r"dtype='dense-slots'; choose one of auto, float32"):
        EngineOptions(dtype="dense-slots")
