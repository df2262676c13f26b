"""The batched search against the one-prompt reference: token for token, score for score, however groups are batched."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
from beam_reference import Model, beam_search, lattice_model, log_softmax, toy_model
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.host.beams.beam import Candidates, merge_candidates, num_candidates, select_beams
from jaxpaged.host.beams.beam_state import BeamState, advance_beams, advance_merged, best_hypotheses

PROMPT = (1, 4, 7)
GOLDEN = toy_model()


@dataclass
class Search:
    """One request of a test: arguments of the reference, and the states that search for it."""

    model: Model
    width: int
    max_tokens: int = 8
    end_ids: tuple[int, ...] = (2,)
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    stops: object = None
    prompt: tuple[int, ...] = PROMPT
    state: BeamState = field(init=False)

    def __post_init__(self):
        self.state = BeamState(
            self.width, self.max_tokens, self.length_penalty, self.early_stopping, self.end_ids,  # type: ignore
            self.find_stops if self.stops else None,
        )  # fmt: skip

    def find_stops(self, parents, tokens):
        running = self.running()
        return np.array([self.stops(running[p] + [t]) for p, t in zip(parents.tolist(), tokens.tolist(), strict=True)])

    def running(self) -> list[list[int]]:
        return [list(self.prompt) + ids for ids in self.state.running_token_ids().tolist()]

    def reference(self):
        return beam_search(
            self.model, self.prompt, self.width, self.max_tokens, self.end_ids, self.length_penalty,
            self.early_stopping, self.stops,
        )  # fmt: skip

    def found(self) -> list[tuple[list[int], float]]:
        return [([*self.prompt, *h.token_ids], h.score) for h in self.state.hypotheses()]


def top_rows(sums: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """What the device gives: the k best of each row [R, V], the lowest token first among equals."""
    tokens = np.argsort(-sums, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(sums, tokens, 1), tokens.astype(np.int32)


def device_step(states: list[BeamState], logprobs: list[np.ndarray]):
    """Scores and tokens of the rows of all states, f32[W, V] each (one row in a first step), and where they start."""
    k = max(state.row_candidates for state in states)
    scores, tokens, starts = [], [], []
    for state, rows in zip(states, logprobs, strict=True):
        sums = rows[:1] if state.num_generated == 0 else rows + state.running_scores[:, None]
        top, ids = top_rows(sums, k)
        starts.append(sum(map(len, scores)))
        scores.append(top)
        tokens.append(ids)
    return np.concatenate(scores), np.concatenate(tokens), starts


def run(searches: list[Search], keep_done: bool = False) -> None:
    """All searches at once to the end. `keep_done` goes on with those that are done while others are not."""
    active = searches
    while active := [s for s in active if keep_done or not s.state.is_done]:
        if all(s.state.is_done for s in active):
            break
        states = [s.state for s in active]
        advance_beams(states, *device_step(states, [s.model(s.running()) for s in active]))


def assert_equal_to_reference(search: Search) -> None:
    expected = [(tokens, float(score)) for tokens, score, is_finished in search.reference() if is_finished]
    assert search.found() == expected, search


GOLDEN_VECTORS = [
    (4, False, 1, [[1,4,7,4,10,4,3,3,9,7,3], [1,4,7,4,3,4,3,7,8,4,9], [1,4,7,4,10,4,3,3,2], [1,4,7,4,3,4,3,7,8,4,0]],
     [-0.592738, -0.666014, -0.729743, -0.759828]),
    (4, True, 1, [[1,4,7,4,10,4,3,3,2], [1,4,7,4,5,6,7,2], [1,4,7,4,10,4,5,2], [1,4,7,4,10,2]],
     [-0.729743, -0.775516, -0.828131, -0.961538]),
    (4, "never", 1, [[1,4,7,4,10,4,3,3,9,7,3], [1,4,7,4,3,4,3,7,8,4,9], [1,4,7,4,10,4,3,3,2], [1,4,7,4,3,4,3,7,8,4,0]],
     [-0.592738, -0.666014, -0.729743, -0.759828]),
    (3, False, 0, [[1,4,7,4,10,2], [1,4,7,4,5,6,7,2], [1,4,7,4,10,4,5,2]], [-2.884613, -3.877578, -4.140654]),
    (2, "never", 2, [[1,4,7,4,10,4,3,3,9,7,3], [1,4,7,4,10,4,3,3,5,5,1]], [-0.074092, -0.095937]),
]  # fmt: skip


@pytest.mark.parametrize("width, early_stopping, length_penalty, tokens, scores", GOLDEN_VECTORS)
def test_golden_vectors_of_transformers(width, early_stopping, length_penalty, tokens, scores):
    search = Search(GOLDEN, width, length_penalty=length_penalty, early_stopping=early_stopping)
    run([search])
    assert [ids for ids, _ in search.found()] == tokens
    np.testing.assert_allclose([score for _, score in search.found()], scores, atol=2e-6)


#: As checked against transformers, with one prompt for two: the number returned only cuts the pool.
GRID = list(
    itertools.product((2, 3, 4, 5), (False, True, "never"), (-1.0, 0.0, 0.6, 1.0, 2.0), ((), (2,), (2, 5)), range(4))
)


def grid_searches() -> list[Search]:
    models = [toy_model(salt=bytes([seed]), scale=1 + seed) for seed in range(4)]
    return [
        Search(models[seed], width, 8, end_ids, length_penalty, early_stopping, prompt=(1, seed, 7))
        for width, early_stopping, length_penalty, end_ids, seed in GRID
    ]


def test_every_configuration_in_one_batch_equals_the_reference():
    searches = grid_searches()
    assert 2 * len(searches) == 1440
    run(searches)
    for search in searches:
        assert_equal_to_reference(search)
        both = [hypothesis for n in (1, 2) for hypothesis in best_hypotheses([search.state], n)]
        assert [h.token_ids for h in both] == [ids[3:] for ids, _ in [search.found()[i] for i in (0, 0, 1)]]


def test_groups_that_are_done_may_stay_in_the_batch_and_keep_their_pool():
    searches = grid_searches()[::7]
    for i, search in enumerate(searches):  # some end early, some late
        search.state = Search(search.model, search.width, 4 + i % 9, search.end_ids, search.length_penalty,
                              search.early_stopping, prompt=search.prompt).state  # fmt: skip
        search.max_tokens = 4 + i % 9
    run(searches, keep_done=True)
    for search in searches:
        expected = [float(score) for _, score, is_finished in search.reference() if is_finished]
        assert [score for _, score in search.found()] == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(
    st.tuples(
        st.integers(1, 9), st.sampled_from([False, True, "never"]), st.sampled_from([-2.0, -1.0, 0.0, 0.7, 1.0, 3.0]),
        st.sampled_from([(), (0,), (2,), (0, 3), (1, 2, 3)]), st.integers(1, 7), st.integers(0, 255), st.booleans(),
    ),
    min_size=1, max_size=6,
))  # fmt: skip
def test_ties_impossible_tokens_and_more_beams_than_tokens(cases):
    searches = []
    for width, early_stopping, length_penalty, ends, max_tokens, salt, may_be_impossible in cases:
        values = (-1.0, -2.0, -3.0, -np.inf) if may_be_impossible else (-1.0, -1.0, -2.0)
        model = lattice_model(5 + salt % 3, bytes([salt]), values)
        searches.append(Search(model, width, max_tokens, ends, length_penalty, early_stopping))
    for search in searches:  # a batch has one vocabulary
        run([search])
        assert_equal_to_reference(search)
    same = [Search(lattice_model(6, bytes([c[5]])), c[0], c[4], c[3], c[2], c[1]) for c in cases]
    run(same)
    for search in same:
        assert_equal_to_reference(search)


def possible_tokens(*tokens: int) -> Model:
    """Six tokens, of which these are possible."""
    row = np.array([-token if token in tokens else -np.inf for token in range(6)], np.float32)
    return lambda lists: np.tile(row, (len(lists), 1))


def test_a_first_step_with_fewer_possible_tokens_than_beams():
    for width, ends in itertools.product((1, 2, 3, 6), ((), (1,), (3,), (1, 3))):
        search = Search(possible_tokens(1, 3), width, 4, ends)
        run([search])
        assert_equal_to_reference(search)


def test_only_what_is_possible_is_found():
    one = Search(possible_tokens(3), 4, 6)
    run([one])
    assert one.found() == [([*PROMPT, 3, 3, 3, 3, 3, 3], -3.0)]
    two = Search(possible_tokens(1, 3), 8, 2)
    run([two])
    assert [tokens[3:] for tokens, _ in two.found()] == [[1, 1], [1, 3], [3, 1], [3, 3]]
    ended = Search(possible_tokens(1, 2), 3, 9, (1, 2), early_stopping=True)
    run([ended])
    assert [tokens[3:] for tokens, _ in ended.found()] == [[1], [2]]


def test_a_search_in_which_nothing_is_possible_is_over_and_finds_what_was_finished_before():
    def until_length(length):  # as if all tokens were forbidden from then on
        return lambda lists: np.full((len(lists), 6), -1.0 if len(lists[0]) < 3 + length else -np.inf, np.float32)

    nothing = Search(until_length(0), 4)
    run([nothing])
    assert nothing.state.is_done and nothing.found() == [] and not nothing.state.has_found
    some = Search(until_length(2), 4)
    run([some])
    assert [tokens[3:] for tokens, _ in some.found()] == [[2], [0, 2]] and some.state.last_score == -2


def test_a_continuation_that_costs_a_billion_is_possible():
    """As logits processors forbid that add a large number: a place without a beam must not go before it."""
    row = np.array([-2e9, -1.0, -3e9], np.float32)
    search = Search(lambda lists: np.tile(row, (len(lists), 1)), 2, 2, (1,))
    run([search])
    assert [tokens[3:] for tokens, _ in search.found()] == [[1], [0, 1]]


def test_positive_scores_as_a_bias_on_log_probabilities_makes_them():
    biased = [lattice_model(7, bytes([salt]), (3.0, 60.0, -2.0, 1.0)) for salt in range(8)]
    searches = [Search(model, 2 + i % 4, 6, (2,), early_stopping=(False, True, "never")[i % 3])
                for i, model in enumerate(biased)]  # fmt: skip
    run(searches)
    for search in searches:
        assert_equal_to_reference(search)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_stop_strings_end_beams_as_end_ids_do(early_stopping):
    def stops(tokens):
        return sum(tokens[-2:]) % 4 == 0

    searches = [Search(toy_model(salt=bytes([i])), width, 7, (2,), early_stopping=early_stopping,
                       stops=stops if i % 2 else None) for i, width in enumerate((1, 2, 4, 8, 3, 5))]  # fmt: skip
    run(searches)
    for search in searches:
        assert_equal_to_reference(search)


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
def test_width_1_is_greedy(early_stopping, length_penalty):
    for salt in range(20):
        model = toy_model(salt=bytes([salt]))
        search = Search(model, 1, 10, (2, 5), length_penalty, early_stopping)
        run([search])
        tokens, total = list(PROMPT), np.float32(0)
        while len(tokens) < 13 and (len(tokens) == 3 or tokens[-1] not in (2, 5)):
            row = model([tokens])[0]
            total += row.max()
            tokens.append(int(row.argmax()))
        assert search.found() == [(tokens, float(total / np.float32((len(tokens) - 3) ** length_penalty)))]
        assert search.state.hypotheses()[0].cumulative_logprob == float(total)


def test_wide_beams_beside_narrow_ones():
    model = toy_model(200, salt=b"wide", scale=3.0)
    cases = [(64, (2,), False), (1, (2,), True), (64, (2, 3, 5, 7), "never"), (4, (), False), (100, (2,), True)]
    searches = [Search(model, width, 6, ends, 1.0, early_stopping) for width, ends, early_stopping in cases]
    run(searches)
    for search in searches:
        assert_equal_to_reference(search)


def test_groups_may_come_leave_and_wait_in_any_order():
    rng = np.random.default_rng(0)
    searches = grid_searches()[::11]
    while active := [s for s in searches if not s.state.is_done]:
        chosen = [active[i] for i in rng.permutation(len(active))[: rng.integers(1, 8)]]
        for is_first in (True, False):
            together = [s for s in chosen if (s.state.num_generated == 0) == is_first]
            if together:
                states = [s.state for s in together]
                advance_beams(states, *device_step(states, [s.model(s.running()) for s in together]))
    for search in searches:
        assert_equal_to_reference(search)


def test_candidates_that_the_device_merged_give_the_same_searches():
    searches = [s for s in grid_searches()[::5] if not s.stops]
    active = searches
    while active:
        states = [s.state for s in active]
        scores, tokens, starts = device_step(states, [s.model(s.running()) for s in active])
        if states[0].num_generated == 0:
            advance_beams(states, scores, tokens, starts)
        else:
            lanes = np.arange(max(state.width for state in states))
            widths = np.array([state.width for state in states])
            rows = np.where(lanes < widths[:, None], np.array(starts)[:, None] + lanes, -1)
            most = np.full(len(states), max(state.num_candidates for state in states))
            merged = merge_candidates(scores, tokens, rows, most)
            advance_merged(states, merged.scores, merged.parents, merged.tokens)
        active = [s for s in active if not s.state.is_done]
    for search in searches:
        assert_equal_to_reference(search)


def test_hypotheses_name_the_beams_whose_logits_chose_their_tokens():
    search = Search(GOLDEN, 4)
    rows = []
    while not search.state.is_done:
        logprobs = GOLDEN(search.running())
        rows.append(logprobs)
        advance_beams([search.state], *device_step([search.state], [logprobs]))
    for hypothesis in search.state.hypotheses():
        assert len(hypothesis.beams) == len(hypothesis.token_ids)
        total = np.float32(0)
        for step, (beam, token) in enumerate(zip(hypothesis.beams, hypothesis.token_ids, strict=True)):
            total += rows[step][beam, token]
        assert hypothesis.cumulative_logprob == float(total)
        assert hypothesis.score == pytest.approx(total / len(hypothesis.token_ids))


# The parts


def test_candidates_of_equal_score_come_by_beam_then_token():
    scores = np.array([[-1, -2, -2], [-1, -1, -3], [-1, -9, -9]], np.float32)
    tokens = np.array([[5, 1, 3], [0, 4, 2], [6, 0, 1]], np.int32)
    rows = np.array([[0, 1], [2, -1]])
    merged = merge_candidates(scores, tokens, rows, np.array([4, 2]))
    assert merged.parents.tolist() == [[0, 1, 1, 0], [0, 0, -1, -1]]
    assert merged.tokens.tolist() == [[5, 0, 4, 1], [6, 0, -1, -1]]
    assert merged.scores.tolist() == [[-1, -1, -1, -2], [-1, -9, -np.inf, -np.inf]]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 40), st.sampled_from([2, 5, 1000]))
def test_merging_rows_is_sorting_everything(seed, num_groups, width, num_values):
    rng = np.random.default_rng(seed)
    vocab = 90
    widths = rng.integers(1, width + 1, num_groups)
    counts = 2 * widths
    sums = -rng.integers(0, num_values, (widths.sum(), vocab)).astype(np.float32)
    scores, tokens = top_rows(sums, min(int(counts.max()), vocab))
    starts = np.cumsum(widths) - widths
    lanes = np.arange(widths.max())
    rows = np.where(lanes < widths[:, None], starts[:, None] + lanes, -1)
    merged = merge_candidates(scores, tokens, rows, counts)
    for g, (start, w, count) in enumerate(zip(starts, widths, counts, strict=True)):
        flat = sums[start : start + w].reshape(-1)
        best = np.argsort(-flat, kind="stable")[:count]
        real = min(count, len(best))
        np.testing.assert_array_equal(merged.parents[g, :real] * vocab + merged.tokens[g, :real], best)
        np.testing.assert_array_equal(merged.scores[g, :real], flat[best])
        assert (merged.tokens[g, count:] == -1).all()


def test_keys_order_candidates_whose_scores_are_kept():
    scores = np.array([[-1, -2], [-3, -4]], np.float32)
    keys = np.array([[-5, -1], [0, -9]], np.float32)
    merged = merge_candidates(scores, np.array([[7, 8], [9, 6]], np.int32), np.array([[0, 1]]), np.array([3]), keys)
    assert (merged.tokens.tolist(), merged.scores.tolist()) == ([[9, 8, 7]], [[-3, -2, -1]])


def test_drawn_candidates_need_not_be_sorted():
    """As in transformers: rank is the order of the draw, running beams are the best of those drawn."""
    state = BeamState(2, 9, end_ids=(0,))
    candidates = Candidates(
        np.array([[-3, -1, -2, -4]], np.float32), np.zeros((1, 4), np.int32), np.array([[0, 5, 6, 7]], np.int32),
        np.array([[True, False, False, False]]),
    )  # fmt: skip
    selection = select_beams(state._batch.beams, candidates, state._batch.rules)
    assert selection.tokens.tolist() == [[5, 6]]
    assert selection.beams.finished.scores.tolist() == [[-3, -np.inf]]


def test_only_the_first_w_candidates_may_finish():
    state = BeamState(2, 9, end_ids=(0,))
    candidates = Candidates(
        np.array([[-1, -2, -3, -4]], np.float32), np.zeros((1, 4), np.int32), np.array([[5, 6, 0, 7]], np.int32),
        np.array([[False, False, True, False]]),
    )  # fmt: skip
    selection = select_beams(state._batch.beams, candidates, state._batch.rules)
    assert not selection.beams.finished.is_finished.any() and not selection.is_done[0]


def test_a_search_whose_candidates_all_end_is_over():
    """Though a place is empty, and the best of them would fill it."""
    state = BeamState(2, 1)
    candidates = Candidates(
        np.array([[200, -np.inf, -np.inf, -np.inf]], np.float32), np.zeros((1, 4), np.int32), np.array([[5, 6, 7, 8]]),
        np.zeros((1, 4), bool),
    )  # fmt: skip
    selection = select_beams(state._batch.beams, candidates, state._batch.rules)
    assert selection.is_done[0] and selection.beams.running_scores.tolist() == [[-np.inf, -np.inf]]
    assert selection.beams.finished.is_finished.tolist() == [[True, False]]


def test_places_behind_a_narrow_group_stay_unused():
    searches = [Search(GOLDEN, 5), Search(GOLDEN, 2, 4, early_stopping="never")]
    states = [search.state for search in searches]
    while not any(state.is_done for state in states):
        advance_beams(states, *device_step(states, [s.model(s.running()) for s in searches]))
        beams = states[1]._batch.beams
        assert (beams.running_scores[1, 2:] == -np.inf).all() and (beams.finished.scores[1, 2:] == -np.inf).all()
        assert not beams.finished.is_finished[1, 2:].any()
    assert states[1].is_done and len(states[1].hypotheses()) == 2


def test_a_sampled_search_keeps_sums_and_draws_by_key():
    rng = np.random.default_rng(5)
    state, model, tokens = BeamState(3, 5), GOLDEN, list(PROMPT)
    while not state.is_done:
        running = [tokens + ids for ids in state.running_token_ids().tolist()]
        sums = model(running) + state.running_scores[:, None] if state.num_generated else model(running[:1])
        keys, ids = top_rows(sums + rng.gumbel(size=sums.shape).astype(np.float32), 6)
        advance_beams([state], np.take_along_axis(sums, ids, 1), ids, [0], keys)
    found = state.hypotheses()
    assert len({tuple(h.token_ids) for h in found}) == 3
    for h in found:
        logprobs = [model([tokens + h.token_ids[:i]])[0, t] for i, t in enumerate(h.token_ids)]
        assert h.cumulative_logprob == pytest.approx(sum(logprobs), abs=1e-5)


@pytest.mark.parametrize("width, num_ends, count", [(4, 0, 8), (4, 1, 8), (4, 2, 12), (1, 3, 4)])
def test_candidates_leave_w_that_do_not_end(width, num_ends, count):
    assert num_candidates(width, num_ends) == count


# Diverse groups


def diverse_reference(model, prompt, params: BeamSearchParams, ends, max_tokens):
    """Diverse search with a row of the whole vocabulary per beam; every group's pool, in the order of turns."""
    width, count = params.group_width, num_candidates(params.group_width, len(ends))
    states = BeamState.of(params, ends, max_tokens)
    alone = [BeamState(width, max_tokens, params.length_penalty, params.early_stopping, ends) for _ in states]
    while any(not state.is_done for state in alone):
        chosen = np.zeros(model([list(prompt)]).shape[1], np.float32)
        for state in alone:
            if state.is_done:
                continue
            running = [list(prompt) + ids for ids in state.running_token_ids().tolist()]
            sums = model(running) + state.running_scores[:, None] - np.float32(params.diversity_penalty) * chosen
            flat = np.argsort(-sums.reshape(-1), kind="stable")[:count]
            vocab = sums.shape[1]
            candidates = Candidates(
                sums.reshape(1, -1)[:, flat], (flat // vocab)[None].astype(np.int32),
                (flat % vocab)[None].astype(np.int32), np.isin(flat % vocab, ends)[None],
            )  # fmt: skip
            selection = select_beams(state._batch.beams, candidates, state._batch.rules)
            state._record(state._batch._replace(beams=selection.beams), 0, selection, bool(selection.is_done[0]))
            np.add.at(chosen, state.tokens[-1], 1)
    return [[(h.token_ids, h.score) for h in state.hypotheses()] for state in alone]


def run_diverse(requests: list[tuple[Model, tuple[int, ...], list[BeamState]]]) -> None:
    while active := [
        (state, model, prompt) for model, prompt, states in requests for state in states if not state.is_done
    ]:
        states = [state for state, _, _ in active]
        rows = [
            model([list(prompt) + ids for ids in state.running_token_ids().tolist()]) for state, model, prompt in active
        ]
        advance_beams(states, *device_step(states, rows))


@pytest.mark.parametrize("make_model", [toy_model, lattice_model])
def test_diverse_groups_equal_turns_over_the_whole_vocabulary(make_model):
    cases = [(4, 2, 1.0, False), (6, 3, 0.5, True), (4, 4, 0.3, "never"), (3, 1, 0.0, False), (8, 2, 2.5, True)]
    requests, expected, some_end_first = [], [], 0
    for salt, (width, groups, strength, early_stopping) in enumerate(cases * 6):
        params = BeamSearchParams(
            beam_width=width, num_beam_groups=groups, diversity_penalty=strength, early_stopping=early_stopping
        )
        model = make_model(23, bytes([salt]))
        requests.append((model, (salt,), BeamState.of(params, [2, 3, 5], 6)))
        expected.append(diverse_reference(model, (salt,), params, [2, 3, 5], 6))
    run_diverse(requests)
    for (_, _, states), pools in zip(requests, expected, strict=True):
        assert [[(h.token_ids, h.score) for h in state.hypotheses()] for state in states] == pools
        ranked = best_hypotheses(states, 3)
        assert [h.score for h in ranked] == sorted((score for pool in pools for _, score in pool), reverse=True)[:3]
        some_end_first += states[0].num_generated < states[-1].num_generated
    assert some_end_first  # a group that is done costs the others nothing


def drawn_step(states: list[BeamState], logprobs: list[np.ndarray], seeds: list[int | None], extra: int):
    """As `device_step` where the searches with a seed are drawn: rows ranked by keys, which are the sums of the others.

    `extra`: candidates that another request of the run needs more of a row than these do.
    """
    k = max(state.row_candidates for state in states) + extra
    scores, tokens, keys, starts = [], [], [], []
    for state, rows, seed in zip(states, logprobs, seeds, strict=True):
        sums = rows[:1] if state.num_generated == 0 else rows + state.running_scores[:, None]
        noise = np.float32(0)
        if seed is not None:
            noise = np.random.default_rng([seed, state.num_generated]).gumbel(size=sums.shape).astype(np.float32)
        top, ids = top_rows(sums + noise, k)
        starts.append(sum(map(len, scores)))
        scores.append(np.take_along_axis(sums, ids, 1))
        tokens.append(ids)
        keys.append(top)
    return np.concatenate(scores), np.concatenate(tokens), starts, np.concatenate(keys)


def pools_of(requests: list[tuple[Model, list[BeamState], int | None]], extra: int) -> list[list]:
    """All searches of all requests at once to their end, ranked by keys: every request's finished pools."""
    while active := [(model, s, seed) for model, states, seed in requests for s in states if not s.is_done]:
        states = [state for _, state, _ in active]
        rows = [model([[*PROMPT, *ids] for ids in state.running_token_ids().tolist()]) for model, state, _ in active]
        advance_beams(states, *drawn_step(states, rows, [seed for _, _, seed in active], extra))
    return [[[(h.token_ids, h.score) for h in s.hypotheses()] for s in states] for _, states, _ in requests]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["plain", "drawn", "diverse"]), st.sampled_from([(2, 1), (4, 2), (6, 3), (3, 3)]),
            st.sampled_from([0.3, 0.8, 1.0, 2.0]), st.sampled_from([False, True, "never"]), st.integers(0, 255),
        ),
        min_size=2, max_size=5,
    ),
    st.sampled_from([toy_model, lattice_model]), st.integers(0, 9),
)  # fmt: skip
def test_searches_ranked_by_keys_beside_drawn_ones_find_what_each_finds_alone(cases, make_model, extra):
    def requests():
        for kind, (width, groups), strength, early_stopping, salt in cases:
            is_diverse = kind == "diverse" and groups > 1
            params = BeamSearchParams(
                beam_width=width, early_stopping=early_stopping, num_beam_groups=groups if is_diverse else 1,
                diversity_penalty=strength if is_diverse else 0.0,
            )  # fmt: skip
            states = BeamState.of(params, [2, 3], 5)
            yield make_model(17, bytes([salt])), states, salt if kind == "drawn" else None, params

    together = pools_of([(model, states, seed) for model, states, seed, _ in requests()], extra)
    for (model, states, seed, params), found in zip(requests(), together, strict=True):
        if seed is None:
            assert found == diverse_reference(model, PROMPT, params, [2, 3], 5)
        else:
            assert found == pools_of([(model, states, seed)], 0)[0]


def test_a_penalty_counts_where_candidates_are_ranked_by_keys():
    """The third group has lost what the others chose, though the step has keys, since a drawn search is part of it."""
    scores = np.array([[-1.0, -1.1, -1.2, -4.0]], np.float32)
    states = BeamState.of(BeamSearchParams(beam_width=3, num_beam_groups=3, diversity_penalty=0.8), [], 3)
    advance_beams(states, scores, np.array([[5, 6, 7, 8]], np.int32), [0, 0, 0], scores.copy())
    assert [state.tokens[-1].tolist() for state in states] == [[5], [6], [7]]
    assert [state.running_scores.tolist() for state in states] == scores[:, :3].T.tolist()


def test_diverse_groups_of_width_1_first_choose_different_tokens():
    def flat(lists):
        return np.tile(log_softmax(np.linspace(0, -0.1, 8).astype(np.float32)), (len(lists), 1))

    states = BeamState.of(BeamSearchParams(beam_width=4, num_beam_groups=4, diversity_penalty=1.0), [], 3)
    assert [state.row_candidates for state in states] == [2, 3, 4, 5]
    advance_beams(states, *device_step(states, [flat([[]])] * 4))
    assert [int(state.tokens[-1][0]) for state in states] == [0, 1, 2, 3]
