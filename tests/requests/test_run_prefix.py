"""A prefix that all requests of a run share: stored once, copied once a request, and not a token is another."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_device import make_group as scripted_group
from scripted_device import make_scheduler, make_search, most_pages_of, run_all, run_searches
from toy import TOY, beam_group, few_programs, make_group, run_checked, toy_engine

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.config import CacheConfig, EngineConfig, PreemptionConfig
from jaxpaged.host.account.accounting import RunStats
from jaxpaged.study.simulate import Simulation
from jaxpaged.study.workloads import Workload

WAYS = {
    "recompute": PreemptionConfig(),
    "swap": PreemptionConfig("swap", swap_pages=1000, transfer_pages=16),
    "swap that overflows": PreemptionConfig("swap", swap_pages=3, transfer_pages=2),
}


def share(groups, prefix_len):
    """The groups, whose prompts begin alike, with their first tokens shared, and different ones behind."""
    for i, group in enumerate(groups):
        (sequence,) = group.sequences
        sequence.token_ids[prefix_len:] = [2000 + 100 * i + k for k in range(group.prompt_len - prefix_len)]
        group.prefix_len = prefix_len
    return groups


def held_pages(scheduler) -> list[list[int]]:
    return [table.pages.tolist() for table in (*scheduler.prefix_tables, *scheduler.tables)]


# Without a device: exact pages, copies and steps


@pytest.mark.parametrize(
    ("prefix_len", "copies", "tables"),
    [
        (10, [(3, 4), (3, 6)], [[1, 2, 3], [1, 2, 4, 5], [1, 2, 6, 7]]),  # its third page is part-filled
        (8, [], [[1, 2], [1, 2, 3], [1, 2, 4]]),
        (3, [(1, 2), (1, 4)], [[1], [2, 3], [4, 5]]),  # shorter than a page
    ],
)
def test_full_pages_are_stored_once_and_a_part_filled_one_is_copied_once_a_request(prefix_len, copies, tables):
    scheduler = make_scheduler(64, page_size=4)
    groups = share([scripted_group(prefix_len + 3, 1) for _ in range(2)], prefix_len)
    scheduler.share_prefix(groups[0].sequences[0].token_ids[:prefix_len])
    for group in groups:
        scheduler.add(group)
    first = scheduler.schedule()
    assert first is not None and [(row.start, row.count) for row in first.rows] == [(0, prefix_len)]
    assert not first.samples and scheduler.allocator.num_used == -(-prefix_len // 4)
    second = scheduler.schedule()
    assert second is not None and [(row.start, row.count) for row in second.rows] == [(prefix_len, 3)] * 2
    assert second.copies == copies and [group.pages.copied for group in groups] == [len(copies) / 2] * 2
    assert held_pages(scheduler) == tables
    scheduler.check_invariants()


def test_samples_fork_behind_the_prefix():
    groups = share([scripted_group(13, 4, n=3)], 10)
    scheduler = make_scheduler(64, page_size=4)
    outputs, plans = run_all(scheduler, groups)
    assert [len(plan.copies) for plan in plans] == [
        0,
        1,
        2,
        0,
        0,
    ]  # the prefix's last page; then of 3 samples all but one
    alone, _ = run_all(make_scheduler(64, page_size=4), more := [scripted_group(13, 4, n=3)])
    assert outputs[groups[0].request_id] == alone[more[0].request_id]


def test_a_long_prefix_is_computed_in_chunks_before_anyone_is_admitted():
    groups = share([scripted_group(12, 1)], 10)
    _, plans = run_all(make_scheduler(64, max_num_batched_tokens=4), groups)
    rows = [[(row.start, row.count) for row in plan.rows] for plan in plans]
    assert rows == [[(0, 4)], [(4, 4)], [(8, 2)], [(10, 2)]]


def test_a_request_computes_its_own_tokens_again_and_never_the_prefix():
    groups = share([scripted_group(12, 12) for _ in range(3)], 10)
    scheduler = make_scheduler(20)
    run_all(scheduler, groups)
    assert sum(group.num_preemptions for group in groups) > 0
    for group in groups:
        assert group.recomputed_tokens <= group.num_preemptions * 14 and group.pages.copied == 0


@pytest.mark.parametrize(("prefix_len", "moved"), [(8, 1), (10, 2), (3, 2)])
def test_a_swap_moves_what_is_not_the_prefixs(prefix_len, moved):
    """Of the request's pages of 4 tokens, those that the prefix fills stay, and are shared again."""
    scheduler = make_scheduler(64, page_size=4, preemption=WAYS["swap"])
    (group,) = share([scripted_group(prefix_len + 4, 3)], prefix_len)
    scheduler.share_prefix(group.sequences[0].token_ids[:prefix_len])
    scheduler.add(group)
    assert scheduler.schedule() and scheduler.schedule()
    before = held_pages(scheduler)
    kept = prefix_len // 4
    own = before[1][kept:]
    swap = scheduler.swap_space.take_out(group, scheduler.allocator)
    assert swap.page_ids == own and len(own) == moved
    assert scheduler.allocator.num_used == len(before[0])
    back = scheduler.swap_space.bring_back(group, scheduler.allocator)
    assert len(back.page_ids) == len(own)
    assert held_pages(scheduler)[1][:kept] == before[0][:kept]
    scheduler.check_invariants()


def test_a_request_that_does_not_fit_beside_the_prefix_is_refused_with_the_numbers():
    scheduler = make_scheduler(num_pages=8, page_size=2)
    (group,) = share([scripted_group(9, 6)], 5)  # alone it takes all 7 pages, and the prefix holds one more
    scheduler.share_prefix(group.sequences[0].token_ids[:5])
    with pytest.raises(ValueError, match=r"prompt of 9 tokens \(5 of them the shared prefix\) .* needs 8 pages of 2"):
        scheduler.add(group)
    (group,) = share([scripted_group(9, 6)], 4)
    make_scheduler(num_pages=8, page_size=2).add(group)
    with pytest.raises(ValueError, match=r"\(100 of them the shared prefix\) leaves no room to generate"):
        scheduler.check(101, 1, 110, 100)


requests = st.lists(
    st.tuples(st.integers(1, 8), st.integers(1, 10), st.integers(1, 4), st.booleans()), min_size=1, max_size=7
)  # own tokens of the prompt, max_tokens, n or beam_width, whether it is a search
ways = st.builds(
    PreemptionConfig, st.sampled_from(["recompute", "swap", "auto"]), st.integers(0, 30), st.floats(0, 4),
    st.integers(1, 9),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(requests, st.integers(1, 14), st.integers(1, 5), st.integers(0, 6), st.integers(1, 40), ways)
def test_every_group_ends_as_without_sharing_in_any_pool(requests, prefix_len, page_size, spare, budget, way):
    """Every sequence reads back its own tokens in every step (PoolModel checks), and the account is exact."""

    def groups(shared_len):
        made = [
            make_search(prefix_len + own, *rest) if is_search else scripted_group(prefix_len + own, rest[0], n=rest[1])
            for own, *rest, is_search in requests
        ]
        share(made, prefix_len)
        for group in made:
            group.prefix_len = shared_len
        return made

    expected = run_searches(make_scheduler(2000, page_size), groups(0))
    shared = groups(prefix_len)
    small = make_scheduler(1 + most_pages_of(shared, page_size) + spare, page_size, 10, budget, preemption=way)
    stats = RunStats.for_cache(small.cache)

    def look(plan):
        stats.record(plan, small)
        filled = {
            (table.pages[i // page_size], i % page_size)
            for table in (*small.prefix_tables, *small.tables)
            for i in range(table.num_slots)
        }
        assert stats.memory.used[-1] == len(filled)

    assert run_searches(small, shared, look) == expected
    account = stats.memory
    total = account.used + account.reserved + account.internal + account.rounding + account.free
    assert (total == account.num_slots).all() and min(array.min() for array in (account.internal, account.free)) >= 0
    assert small.swap_space.num_free == small.swap_space.num_pages


def test_what_sharing_saves_is_counted_against_requests_without_a_prefix_of_their_own():
    """4 requests of 8 + 4 tokens, pages of 4: 12 pages without sharing; with it 2, and one each."""
    workload = Workload(np.full(4, 4, np.int32), np.full(4, 1, np.int32), np.zeros(4))
    stats = Simulation(workload, CacheConfig(4, 64), EngineConfig(64, 8, 64), prefix_len=8).run()
    assert stats.logical_pages.tolist() == [0, 12] and stats.pages_used.tolist() == [2, 6]
    assert stats.memory.saving.tolist() == [0.0, 0.5] and stats.memory.mean_saving == pytest.approx(0.5)
    assert stats.memory.used.tolist() == [8, 24] and stats.running.tolist() == [0, 4]
    assert stats.num_prompt_tokens == 48
    with pytest.raises(ValueError, match="prefix_len must be at least 0, got -1"):
        Simulation(workload, CacheConfig(4, 64), EngineConfig(64, 8, 64), prefix_len=-1)


# With a model: the same tokens

RNG = np.random.default_rng(3)
PREFIX = RNG.integers(0, TOY.vocab_size, 30).tolist()
SUFFIXES = [RNG.integers(0, TOY.vocab_size, count).tolist() for count in (1, 5, 2, 9, 3, 4, 1, 6, 7)]


def load(prefix_len, is_shared=True) -> list:
    """Greedy requests, three samples each, and beams, in one batch."""
    groups = []
    for i, suffix in enumerate(SUFFIXES):
        prompt = PREFIX[:prefix_len] + suffix
        if i % 3 == 0:
            groups.append(make_group(prompt, SamplingParams(temperature=0, max_tokens=14), str(i)))
        elif i % 3 == 1:
            groups.append(make_group(prompt, SamplingParams(n=3, max_tokens=12), str(i), seed=i))
        else:
            groups.append(beam_group(prompt, BeamSearchParams(beam_width=4, max_tokens=10), (31, 94), str(i)))
        groups[-1].prefix_len = prefix_len if is_shared else 0
    return groups


@pytest.fixture(scope="module")
def expected():
    """By length of the prefix: what requests give that compute their whole prompts, and how many tokens that takes."""
    engine = few_programs(toy_engine(num_pages=1000))
    return {
        length: (run_checked(engine, load(length, is_shared=False)), engine.stats.batch_tokens.sum())
        for length in (1, 3, 8, 10, 30)
    }


@pytest.mark.parametrize("prefix_len", [1, 3, 8, 10, 30])
def test_a_shared_prefix_changes_no_token(expected, prefix_len):
    engine = few_programs(toy_engine(num_pages=1000))
    tokens, num_computed = expected[prefix_len]
    assert run_checked(engine, groups := load(prefix_len)) == tokens
    assert engine.stats.num_prompt_tokens == sum(prefix_len + len(suffix) for suffix in SUFFIXES)
    assert engine.stats.batch_tokens.sum() == num_computed - (len(SUFFIXES) - 1) * prefix_len
    assert all(group.pages.copied >= (prefix_len % 4 > 0) for group in groups)
    assert run_checked(engine, load(prefix_len)) == tokens  # nothing is left of the run before


@pytest.mark.slow  # the contract's runs have prefixes and pages of all sizes
@pytest.mark.parametrize("page_size", [1, 16])
def test_the_page_size_changes_no_token(expected, page_size):
    engine = few_programs(toy_engine(num_pages=2000 // page_size, page_size=page_size))
    assert run_checked(engine, load(10)) == expected[10][0]


@pytest.mark.parametrize("way", WAYS)
def test_preemption_changes_no_token(expected, way):
    largest = most_pages_of(load(10), page_size=4)
    engine = few_programs(toy_engine(num_pages=1 + largest, preemption=WAYS[way]))
    assert run_checked(engine, load(10)) == expected[10][0]
    stats = engine.stats
    assert stats.preemptions > 0 and stats.pages_used.min() >= 3 and stats.pages_used.max() <= largest
    assert (stats.swaps_in > 0) == (way != "recompute") and (stats.recomputed_tokens > 0) == (way != "swap")


def test_the_prefix_is_there_before_the_first_request_comes(expected):
    engine = few_programs(toy_engine(num_pages=1000))
    groups = load(8)
    for group in groups:
        group.arrival_time = 0.05
    assert run_checked(engine, groups) == expected[8][0]
    assert engine.stats.steps_after_pauses.tolist() == [1] and engine.stats.batch_tokens[0] == 8


def test_leaving_early_lets_go_of_the_prefix(expected):
    engine = few_programs(toy_engine(num_pages=1000))
    results = engine.run(load(10))
    next(results)
    results.close()
    assert engine.scheduler.allocator.num_used == 0 and engine.scheduler.prefix is None
    assert run_checked(engine, load(8)) == expected[8][0]
