"""Pages that are known by their tokens: found again, never written, given up when others need them; and not a token is
another for it."""

from __future__ import annotations

import functools
from array import array
from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_device import PoolModel, begin, make_group, make_scheduler, make_search, most_pages_of

from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.config import CacheConfig, PreemptionConfig
from jaxpaged.host.account.accounting import RunStats
from jaxpaged.host.account.memory_account import CATEGORIES
from jaxpaged.host.beams.beam_state import best_hypotheses
from jaxpaged.host.pages.block_table import BlockTable, append_slots, fork, release, truncate
from jaxpaged.host.pages.page_allocator import OutOfPagesError, PageAllocator
from jaxpaged.host.pages.token_tree import plan_placements
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.step_io import RowCandidates, StepOutputs, TokenLogprobs

SWAP = PreemptionConfig("swap", swap_pages=1000, transfer_pages=16)
PRIME = (1 << 61) - 1


class DeepPool(PoolModel):
    """Holds in every slot a number that is told by all tokens up to it, as keys and values are; the next token follows
    from what is read of the last. Pages that are free and unknown are scribbled over."""

    def __init__(self, allocator: PageAllocator, window: int | None = None):
        super().__init__(allocator.page_size, window=window)
        self.allocator = allocator
        self.names: dict[bytes, list[int]] = {}  # by hash, what a page of that name holds

    def token_at(self, sequence, position):
        value, known = 0, sequence.token_ids
        for i in range(position + 1):
            value = (
                value * 1_000_003 + (known[i] if i < len(known) else self.latest[sequence.pending_row]) + 1
            ) % PRIME
        return value

    def swap(self, group, page_ids, is_out):
        """What is taken out stays readable to others who share it, or will find it."""
        before = dict(self.tokens)
        super().swap(group, page_ids, is_out)
        for page in page_ids if is_out else ():
            if self.allocator.ref_count(page) or page in self.allocator.known.hashes:
                self.tokens.update({(page, offset): before[page, offset] for offset in range(self.page_size)})

    def run(self, plan):
        known = [page for page, one in self.allocator.known.hashes.items() if self.known_before.get(page) == one]
        held = {(page, offset): self.tokens[page, offset] for page in known for offset in range(self.page_size)}
        outputs = super().run(plan)
        assert all(self.tokens[slot] == value for slot, value in held.items()), "a page was written that can be found"
        return outputs

    def choose(self, plan):
        rows = plan.rows
        numbers = []
        for sample in plan.samples:
            sequence, row = sample.sequence, rows[sample.row]
            last = row.start + row.count - 1
            page, offset = row.sequence.table.pages[last // self.page_size], last % self.page_size
            numbers.append(self.tokens[page, offset] * 7 + 31 * sequence.sample_index)
        self.latest = [number % 13 % 4 for number in numbers]  # 0 ends a sample
        tokens = np.array(self.latest, np.int32)
        outputs = StepOutputs(tokens, TokenLogprobs(np.full(len(tokens), -1.0, np.float32)))
        if not any(sample.group.beams for sample in plan.samples):
            return outputs
        scores, ids = np.zeros((len(numbers), 40), np.float32), np.zeros((len(numbers), 40), np.int32)
        for i, (number, sample) in enumerate(zip(numbers, plan.samples, strict=True)):
            ids[i] = (number % 997 + 7 * np.arange(40)) % 997
            scores[i] = sample.sequence.cumulative_logprob - np.sort((ids[i] * 389 % 997 + 1) / 300)
        return outputs._replace(candidates=RowCandidates(scores, ids))

    def look(self, scheduler: Scheduler, at_rest: bool) -> None:
        """Every page that can be found holds what its name says. `at_rest`: no step is in flight."""
        size, known = self.page_size, self.allocator.known
        for group in (*scheduler.running, *scheduler.waiting, *filter(None, [scheduler.prefix])):
            for sequence in group.sequences:
                self.name(sequence)
        for page, name in known.hashes.items():
            assert [self.tokens[page, offset] for offset in range(size)] == self.names[name]
        if at_rest:
            for page in range(1, self.allocator.num_pages):
                if not self.allocator.ref_count(page) and page not in known.hashes:
                    self.tokens.update({(page, offset): -3 for offset in range(size)})
        self.known_before = dict(known.hashes)

    def name(self, sequence) -> None:
        """Compute the names of a sequence's full pages once more, and what such pages hold."""
        size, ids, name = self.page_size, sequence.token_ids, self.allocator.known._root
        for end in range(size, len(ids) + 1, size):
            name = blake2b(name + array("i", ids[end - size : end]).tobytes(), digest_size=16).digest()
            if name not in self.names:
                self.names[name] = [self.token_at(sequence, position) for position in range(end - size, end)]


def run_call(scheduler, groups, pool, is_ahead=False, most_steps=5000) -> dict:
    """Run the groups, or leave after so many steps; the outputs of those that ended."""
    begin(scheduler, groups)
    done, flight, num_steps = {}, None, 0
    pool.look(scheduler, at_rest=True)
    while num_steps < most_steps and (flight is not None or (plan := scheduler.schedule()) is not None):
        num_steps += 1
        if flight is None:
            for group in scheduler.running:  # beams that gave way are known by tokens that they have now
                for sequence in group.sequences:
                    pool.name(sequence)
            flight = plan, pool.run(plan)
        (plan, outputs), flight = flight, None
        if is_ahead and scheduler.can_foresee(plan):
            scheduler.foresee(plan)
            if (following := scheduler.schedule(is_ahead=True)) is not None:
                flight = following, pool.run(following)
        for group in [*scheduler.running, *scheduler.waiting]:
            for sequence in group.sequences:
                pool.name(sequence)
        finished = scheduler.commit(plan, outputs)
        for group in finished:
            for sequence in group.sequences:
                pool.name(sequence)
            done[group.request_id] = (
                [(h.token_ids, h.score) for h in best_hypotheses(group.beams, 99)]
                if group.beams
                else [sequence.output_ids for sequence in group.sequences]
            )
        scheduler.check_invariants()
        pool.look(scheduler, at_rest=flight is None)
    assert num_steps < 5000, "the scheduler makes no progress"
    return done


def next_call(scheduler: Scheduler) -> Scheduler:
    """As the engine begins a run over the pool of the last one."""
    scheduler.allocator.drop_tables()
    return Scheduler(scheduler.cache, scheduler.limits, scheduler.allocator)


def request(name, prompt, max_tokens, n=1, **kwargs):
    group = make_group(len(prompt), max_tokens, n, **kwargs)
    group.request_id, group.sequences[0].token_ids = name, list(prompt)
    return group


def search(name, prompt, max_tokens, width):
    group = make_search(len(prompt), max_tokens, width)
    group.request_id, group.sequences[0].token_ids = name, list(prompt)
    return group


# Exact pages, steps and counts


def rows_of(plan):
    return [(row.start, row.count) for row in plan.rows]


def test_a_prompt_that_comes_again_computes_its_last_page_alone():
    scheduler = make_scheduler(64, page_size=4, prefix_caching=True)
    pool = DeepPool(scheduler.allocator)
    prompt = list(range(10, 22))  # three full pages; of the last one a token has to give logits
    run_call(scheduler, [request("a", prompt, 1)], pool)
    scheduler = next_call(scheduler)
    again, longer, other = request("b", prompt, 1), request("c", [*prompt, 7], 1), request("d", [1, *prompt], 1)
    begin(scheduler, [again, longer, other])
    assert rows_of(scheduler.schedule()) == [(8, 4)]  # the next is a row of one token, which is for a decode step
    assert [group.cached_tokens for group in (again, longer, other)] == [8, 12, 0]
    assert scheduler.num_cached_tokens == 20


def test_what_a_request_has_generated_is_found_by_the_next_turn_of_a_conversation():
    scheduler = make_scheduler(64, page_size=4, prefix_caching=True)
    pool = DeepPool(scheduler.allocator)
    first = request("a", [10, 11, 12, 13, 14], 9, ignore_eos=True)
    first.eos_ids = frozenset()
    (output,) = run_call(scheduler, [first], pool)["a"]
    assert len(output) == 9  # of 14 tokens the last was never computed: 13, in three full pages
    second = request("b", [10, 11, 12, 13, 14, *output, 50, 51], 2)
    run_call(next_call(scheduler), [second], pool)
    assert second.cached_tokens == 12


def test_requests_of_one_step_do_not_find_what_it_fills():
    scheduler = make_scheduler(64, page_size=4, prefix_caching=True)
    prompt = list(range(10, 22))
    groups = [request(str(i), prompt, 4) for i in range(3)]
    begin(scheduler, groups[:2])
    assert rows_of(scheduler.schedule()) == [(0, 12), (0, 12)]
    scheduler.add(groups[2])
    assert (8, 4) in rows_of(scheduler.schedule())  # found, though the step before is perhaps not carried out


def test_a_prompt_that_is_computed_in_chunks_is_found_as_far_as_it_is_planned():
    scheduler = make_scheduler(64, page_size=4, max_num_batched_tokens=8, prefix_caching=True)
    prompt = list(range(10, 30))
    begin(scheduler, [request("a", prompt, 1)])
    assert rows_of(scheduler.schedule()) == [(0, 8)]
    assert len(scheduler.allocator.known.hashes) == 2
    late = request("b", prompt[:9], 1)
    assert len(scheduler._find(late, late.sequences[0])) == 2


def test_log_probabilities_of_a_prompt_are_computed_whatever_is_known():
    scheduler = make_scheduler(64, page_size=4, prefix_caching=True)
    pool = DeepPool(scheduler.allocator)
    prompt = list(range(10, 22))
    run_call(scheduler, [request("a", prompt, 1)], pool)
    scheduler = next_call(scheduler)
    group = request("b", prompt, 1, prompt_logprobs=0)
    begin(scheduler, [group])
    assert rows_of(scheduler.schedule()) == [(0, 12)] and group.cached_tokens == 0
    scheduler.check_invariants()


def test_admission_counts_pages_that_rest_and_are_found_as_taken():
    """Of 6 free pages 3 rest. A prompt that finds 2 of them and needs 1 more leaves 3, not 5."""
    scheduler = make_scheduler(7, page_size=4, prefix_caching=True)
    pool = DeepPool(scheduler.allocator)
    prompt = list(range(10, 22))
    run_call(scheduler, [request("a", prompt, 1)], pool)
    scheduler = next_call(scheduler)
    assert scheduler.allocator.num_free == 6 and scheduler.num_cached_pages == 3
    begin(scheduler, [request("b", prompt, 1)])
    assert scheduler.schedule() and scheduler.allocator.num_free == 3 and scheduler.num_cached_pages == 1


def test_one_that_finds_its_pages_waits_for_room_like_any_other():
    scheduler = make_scheduler(7, page_size=4, prefix_caching=True)
    pool = DeepPool(scheduler.allocator)
    prompt = list(range(10, 22))
    run_call(scheduler, [request("a", prompt, 1)], pool)
    scheduler = next_call(scheduler)
    begin(scheduler, [request("x", [1] * 14, 2), request("b", prompt, 1)])  # 4 pages, of which one has rested
    assert rows_of(scheduler.schedule()) == [(0, 14)]
    assert scheduler.is_short and len(scheduler.waiting) == 1
    scheduler.check_invariants()


def test_pages_that_rest_and_are_found_do_not_make_room_for_the_others():
    """Of 6 pages 4 are held, and the other 2 are found: there is none for the third page of the prompt."""
    scheduler = make_scheduler(7, page_size=4, prefix_caching=True)
    prompt = list(range(10, 22))
    run_call(scheduler, [request("a", prompt, 1)], DeepPool(scheduler.allocator))
    scheduler = next_call(scheduler)
    begin(scheduler, [request("x", [1] * 14, 2)])
    assert scheduler.schedule() and scheduler.num_cached_pages == scheduler.allocator.num_free == 2
    group = request("b", prompt, 1)
    placements = plan_placements(group, 4, functools.partial(scheduler._find, group))
    assert [len(one.found) for one in placements] == [2]
    assert not scheduler.policy.try_place(group, placements, lambda: 0)
    scheduler.check_invariants()


def test_beams_that_give_way_again_and_again_find_the_tokens_that_they_have_then():
    scheduler = make_scheduler(18, page_size=2, prefix_caching=True)
    searches = [search(str(i), [1, 2, 3 + i], 8, 3) for i in range(3)]
    done = run_call(scheduler, searches, DeepPool(scheduler.allocator))
    without = make_scheduler(18, page_size=2)
    again = [search(str(i), [1, 2, 3 + i], 8, 3) for i in range(3)]
    assert run_call(without, again, DeepPool(without.allocator)) == done
    assert max(group.num_preemptions for group in searches) > 1
    assert sum(g.recomputed_tokens for g in searches) < sum(g.recomputed_tokens for g in again)


def test_pages_that_rest_are_given_up_the_longest_first_and_ends_before_beginnings():
    allocator = PageAllocator(9, 2, prefix_caching=True)
    tables = []
    for first in (1, 5):
        table = BlockTable()
        append_slots([table], [8], allocator)
        allocator.known.add(table.pages, array("i", range(first, first + 8)), [], 0, 4)
        tables.append(table)
    first, second = (list(table.pages) for table in tables)
    for table in tables:
        release(table, allocator)
    assert allocator.num_free == 8 and allocator.num_resting == 8
    assert [allocator.allocate() for _ in range(8)] == first[::-1] + second[::-1]
    with pytest.raises(OutOfPagesError, match="all 8 pages are in use"):
        allocator.allocate()
    assert not allocator.known.hashes


def test_a_page_that_is_cut_is_known_no_more():
    """Whoever cut it may be its last holder, and write to it in place."""
    allocator = PageAllocator(9, 4, prefix_caching=True)
    table, ids = BlockTable(), array("i", range(8))
    append_slots([table], [8], allocator)
    allocator.known.add(table.pages, ids, [], 0, 2)
    other = fork(table, allocator)
    truncate(other, 6, allocator)
    assert allocator.known.find(ids, [], 2) == list(table.pages[:1])
    release(table, allocator)
    assert append_slots([other], [1], allocator) == []
    allocator.check_invariants()


def test_what_is_known_already_stays_with_the_page_that_was_first():
    allocator, ids = PageAllocator(9, 4, prefix_caching=True), array("i", range(4))
    tables = [BlockTable(), BlockTable()]
    append_slots(tables, [4, 4], allocator)
    for table in tables:
        allocator.known.add(table.pages, ids, [], 0, 1)
    assert allocator.known.find(ids, [], 1) == list(tables[0].pages)
    release(tables[1], allocator)
    assert allocator.num_resting == 0
    allocator.check_invariants()


def test_a_page_that_an_interrupt_lost_is_free_when_all_tables_are_dropped():
    allocator, table = PageAllocator(9, 4, prefix_caching=True), BlockTable()
    append_slots([table], [8], allocator)
    allocator.known.add(table.pages, array("i", range(8)), [], 0, 1)
    allocator._free.pop()  # taken, and not counted yet
    allocator.drop_tables()
    assert (allocator.num_free, allocator.num_resting) == (8, 1)
    allocator.check_invariants()


def test_nothing_is_known_where_caching_is_off():
    scheduler = make_scheduler(64, page_size=4, prefix_caching=False)
    pool = DeepPool(scheduler.allocator)
    run_call(scheduler, [request("a", list(range(12)), 3, n=2)], pool)
    assert not scheduler.allocator.known.hashes and scheduler.num_cached_pages == 0


def test_a_shared_prefix_that_comes_again_is_found_and_its_pages_are_the_same_for_all():
    scheduler = make_scheduler(64, page_size=4, prefix_caching=True)
    pool = DeepPool(scheduler.allocator)
    prefix = list(range(10, 20))
    for call in range(2):
        groups = [request(f"{call}{i}", [*prefix, 30 + i, 31], 3) for i in range(3)]
        for group in groups:
            group.prefix_len = 10
        begin(scheduler, groups)
        assert rows_of(scheduler.schedule()) == [[(0, 10)], [(8, 2)]][call]
        assert scheduler.num_cached_tokens == 8 * call
        scheduler = next_call(scheduler)
        for slot in [(page, offset) for page in range(64) for offset in range(4)]:
            pool.tokens.setdefault(slot, -1)


def test_the_account_has_pages_that_rest_as_a_state_of_their_own():
    scheduler = make_scheduler(11, page_size=4, prefix_caching=True)
    pool, stats = DeepPool(scheduler.allocator), RunStats.for_cache(CacheConfig(4, 11))
    for name in "ab":
        group = request(name, list(range(10, 19)), 2)
        begin(scheduler, [group])
        pool.known_before = {}
        while (plan := scheduler.schedule()) is not None:
            stats.record(plan, scheduler)
            scheduler.commit(plan, pool.run(plan))
        scheduler = next_call(scheduler)
    memory = stats.memory
    assert set(sum(getattr(memory, name) for name in CATEGORIES)) == {40}
    assert memory.cached.tolist()[0] == 0 and memory.free.tolist()[0] == 40 - 12
    assert (memory.used.tolist()[-1], memory.cached.tolist()[-1]) == (10 if stats.steps == 4 else 9, 0)


# Random workloads


stems = st.lists(st.integers(1, 3), min_size=0, max_size=12)
asked = st.tuples(
    st.integers(0, 3),
    st.lists(st.integers(1, 3), max_size=9),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from(["samples", "beams", "prompt_logprobs"]),
)  # which stem, own tokens, max_tokens, n or width
calls = st.lists(
    st.tuples(st.lists(asked, min_size=1, max_size=5), st.booleans(), st.integers(1, 60), st.booleans()),
    min_size=1,
    max_size=4,
)  # requests, whether one step ahead, steps after which it may be left, whether it is
ways = st.builds(
    PreemptionConfig, st.sampled_from(["recompute", "swap", "auto"]), st.integers(0, 30), st.floats(0, 4),
    st.integers(1, 9),
)  # fmt: skip


def make_requests(call, one_call, stem_list, texts, prefix):
    groups = []
    for i, (stem, own, max_tokens, width, kind) in enumerate(one_call):
        turn = texts[(stem + i) % len(texts)] if texts and stem == 3 else []  # goes on from an earlier answer
        prompt = [*prefix, *(turn or stem_list[stem % len(stem_list)]), *own, 1][:40]
        make = search if kind == "beams" else request
        group = make(f"{call}.{i}", prompt, max_tokens, width)
        if kind == "prompt_logprobs" and not prefix:
            group.params = SamplingParams(n=width, max_tokens=max_tokens, prompt_logprobs=0)
        group.prefix_len = len(prefix)
        groups.append(group)
    return groups


def run_calls(all_calls, stem_list, prefix_len, page_size, spare, budget, preemption, mixed, caching, window=None):
    """Every call over one pool, as those of one LLM; outputs by request, and how many tokens were found."""
    prefix = ([1, 2, 3, 1] * 3)[:prefix_len]
    done, texts, scheduler, num_found = {}, [], None, 0
    for call, (asks, is_ahead, num_steps, is_left) in enumerate(all_calls):
        groups = make_requests(call, asks, stem_list, texts, prefix)
        if scheduler is None:
            first = [g for c in all_calls for g in make_requests(0, c[0], [[1] * 30], [[1] * 40], prefix)]
            pages = most_pages_of(first, page_size, window) + spare + 1
            scheduler = make_scheduler(
                pages, page_size, 64, budget, preemption=preemption, mixed_steps=mixed, prefix_caching=caching,
                window=window,
            )  # fmt: skip
            pool = DeepPool(scheduler.allocator, window)
        else:
            scheduler = next_call(scheduler)
            pool.swapped.clear()
        found = run_call(scheduler, groups, pool, is_ahead, num_steps if is_left else 5000)
        num_found += scheduler.num_cached_tokens
        if not is_left:
            assert scheduler.allocator.num_used == sum(len(table.pages) for table in scheduler.prefix_tables)
            assert len(found) == len(groups) and not pool.swapped
            done |= found
            for group in groups:
                if not group.beams:
                    texts.append(group.sequences[0].token_ids[prefix_len:])
    return done, num_found


@pytest.mark.parametrize("seed", [0])
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    calls, st.lists(stems, min_size=1, max_size=3), st.sampled_from([0, 0, 3, 8]), st.integers(1, 4),
    st.integers(0, 12), st.integers(1, 40), ways, st.booleans(),
)  # fmt: skip
def test_random_calls_get_the_tokens_that_they_get_without(
    seed, all_calls, stem_list, prefix_len, page_size, spare, budget, preemption, mixed
):
    """Small pools, so that known pages are given up under pressure; common beginnings; samples, beams and stops;
    requests that give way; calls that are left in the middle. After every step each page that can be found holds what
    its name says, and whoever reads a page reads what its own tokens say."""
    arguments = all_calls, stem_list, prefix_len, page_size, spare, budget, preemption, mixed
    with_cache, _ = run_calls(*arguments, caching=True)
    without, nothing = run_calls(*arguments, caching=False)
    assert with_cache == without and nothing == 0
