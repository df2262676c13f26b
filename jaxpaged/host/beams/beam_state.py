"""One group of beams over all its steps, and the step of many groups at once.

`advance_beams` takes what the device found for every row, decides with `select_beams`, and tells each group; the only
work in Python is one call a group. A group keeps the parents and tokens of each step, from which token lists are made
when they are asked for: a list is never copied because a beam was forked.

Diverse groups of one request are groups of their own that take turns: in each step the first chooses as if it were
alone; a token that earlier turns chose c times for their running beams costs the later ones c * diversity_penalty. (So
did transformers, up to its version 4, and fairseq. The penalties are part of the sums.) Each fills its own pool, and
the request's hypotheses are the best of all pools.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.host.beams.beam import (
    NOTHING,
    BeamRules,
    Beams,
    Candidates,
    Finished,
    Selection,
    merge_candidates,
    num_candidates,
    select_beams,
)
from jaxpaged.host.constraints.places import BeamPlaces

#: `find_stops(parents i32[C], tokens i32[C]) -> bool[C]`: which candidates complete a stop string.
FindStops = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Hypothesis(NamedTuple):
    """One finished beam."""

    token_ids: list[int]
    score: float  # cumulative_logprob / number of tokens ** length_penalty
    cumulative_logprob: float
    beams: list[int]  # running beam from whose logits each token was taken
    search: int = 0  # which of a request's groups of beams found it


class _Batch(NamedTuple):
    """Groups that advanced together. The groups keep it, so nothing is gathered while they stay together."""

    beams: Beams
    rules: BeamRules
    counts: np.ndarray  # i32[G]  candidates
    end_ids: np.ndarray  # i32[G, E], padded with -2, which is no token


@dataclass(slots=True, eq=False)
class BeamState:
    """One search: its rules, the choices of each step, its finished pool."""

    widths: tuple[int, ...]  # beams behind each step; the last number holds for all further ones
    max_tokens: int  # generated length at which every beam ends
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    end_ids: Sequence[int] = ()
    find_stops: FindStops | None = None
    places: BeamPlaces | None = None  # of its beams, in what limits the request
    diversity_penalty: float = 0.0
    earlier: Sequence[BeamState] = ()  # groups of the same request that choose before this one
    is_done: bool = False
    last_score: float = 0.0  # when it is done: the sum of the best beam before its last step
    parents: list[np.ndarray] = field(default_factory=list)  # i32[W] a step: beam that each beam continued
    tokens: list[np.ndarray] = field(default_factory=list)  # i32[W] a step
    logprobs: list[Any] = field(default_factory=list)  # a step's `StepLogprobs`, if the request keeps them
    _batch: _Batch = field(init=False)
    _place: int = 0  # of this group in the batch

    def __post_init__(self):
        if isinstance(self.widths, int):
            self.widths = (self.widths,)
        self._batch = _start(self)

    @classmethod
    def of(cls, params: BeamSearchParams, end_ids: Iterable[int], max_tokens: int) -> list[BeamState]:
        """The searches of one request, in the order of their turns: one for each of `num_beam_groups`."""
        ends = sorted(set(end_ids))
        states: list[BeamState] = []
        for _ in range(params.num_beam_groups):
            states.append(
                cls(
                    params.group_widths,
                    max_tokens,
                    params.length_penalty,
                    params.early_stopping,
                    ends,
                    diversity_penalty=params.diversity_penalty,
                    earlier=tuple(states),
                )  # fmt: skip
            )
        return states

    @property
    def num_generated(self) -> int:
        return len(self.parents)

    @property
    def width(self) -> int:
        """Beams that run; before the first step, those that will."""
        return self.widths[min(max(self.num_generated, 1), len(self.widths)) - 1]

    @property
    def next_width(self) -> int:
        """Beams that will run behind the next step."""
        return self.widths[min(self.num_generated, len(self.widths) - 1)]

    @property
    def most_rows(self) -> int:
        """The most beams that run now or later."""
        return max(self.width, *self.widths[min(self.num_generated, len(self.widths) - 1) :])

    @property
    def goes_on_behind_next(self) -> bool:
        """Whether one more step can follow the next before that is known: it is not the last by its length, and as many
        beams run on."""
        return self.num_generated + 1 < self.max_tokens and self.next_width == self.width

    @property
    def num_candidates(self) -> int:
        """In the next step."""
        return num_candidates(self.next_width, len(self.end_ids))

    @property
    def row_candidates(self) -> int:
        """Candidates that the device must keep of each row, where the vocabulary has so many.

        Tokens that earlier turns chose may drop out, so there must be as many more.
        """
        most = num_candidates(max(self.widths), len(self.end_ids))
        return most + sum(state.width for state in self.earlier)

    @property
    def has_found(self) -> bool:
        """Whether there is a finished hypothesis."""
        return bool(self._batch.beams.finished.is_finished[self._place].any())

    @property
    def running_scores(self) -> np.ndarray:
        """f32[W]: sums of log-probabilities of the running beams, which the device adds to the next ones.

        Best first; -inf in the places behind them, where there are fewer than W.
        """
        return self._batch.beams.running_scores[self._place, : self.width]

    def running_token_ids(self) -> np.ndarray:
        """i32[W, T]: generated tokens of the running beams."""
        if not self.parents:
            return np.zeros((self.width, 0), np.int32)
        last = np.full(self.width, self.num_generated - 1)
        return self._walk(last, self.parents[-1], self.tokens[-1])[0]

    def best_token_ids(self) -> list[int]:
        """Generated tokens of the best running beam; of a search that is done, as it was before the last step."""
        step = self.num_generated - 1 - self.is_done
        if step < 0:
            return []
        tokens, _ = self._walk(np.array([step]), self.parents[step][:1], self.tokens[step][:1])
        return tokens[0, : step + 1].tolist()

    def hypotheses(self) -> list[Hypothesis]:
        """The finished pool, best first. Fewer than `width` only where so many were not possible, or not finished."""
        pool = Finished(*(values[self._place] for values in self._batch.beams.finished))
        pool = Finished(*(values[pool.is_finished] for values in pool))
        tokens, beams = self._walk(pool.steps, pool.parents, pool.tokens)
        columns = (tokens, pool.scores, pool.sums, beams, pool.steps + 1)
        return [
            Hypothesis(token_ids[:length], score, total, of_beams[:length], len(self.earlier))
            for token_ids, score, total, of_beams, length in zip(*(c.tolist() for c in columns), strict=True)
        ]

    def _walk(self, steps: np.ndarray, parents: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and beams i32[C, T] of C references, by following parents back; behind `steps` they mean nothing."""
        all_tokens = np.zeros((len(steps), self.num_generated), np.int32)
        all_beams = np.zeros_like(all_tokens)
        beam = np.zeros(len(steps), np.int32)
        for step in range(self.num_generated - 1, -1, -1):
            is_last = steps == step
            all_tokens[:, step] = np.where(is_last, tokens, self.tokens[step][beam])
            all_beams[:, step] = np.where(is_last, parents, self.parents[step][beam])
            beam = all_beams[:, step]
        return all_tokens, all_beams

    def _record(self, batch: _Batch, place: int, selection: Selection, is_done: bool) -> None:
        width = self.next_width
        if is_done:
            self.end()
        elif self.places is not None:
            self.places.advance(selection.parents[place, :width], selection.tokens[place, :width])
        self.parents.append(selection.parents[place, :width])
        self.tokens.append(selection.tokens[place, :width])
        self._batch, self._place = batch, place

    def end(self) -> None:
        """Nothing goes on from the running beams."""
        self.is_done, self.last_score = True, float(self.running_scores[0])


def best_hypotheses(states: Iterable[BeamState], count: int) -> list[Hypothesis]:
    """The `count` best of all pools of one request; the pool of an earlier turn goes first among equals."""
    found = [hypothesis for state in states for hypothesis in state.hypotheses()]
    return sorted(found, key=lambda hypothesis: -hypothesis.score)[:count]


def advance_beams(
    states: Sequence[BeamState],
    scores: np.ndarray,
    tokens: np.ndarray,
    first_rows: Sequence[int],
    keys: np.ndarray | None = None,
) -> None:
    """One step of all groups that are not done, each by its own rules; afterwards ask `is_done`, `parents[-1]`,
    `tokens[-1]` and `running_scores`.

    scores f32[R, k], tokens i32[R, k] (and keys f32[R, k]) are those of `merge_candidates`, k at least the largest
    `row_candidates` or the whole vocabulary. Group i has the rows from `first_rows[i]` on, one a running beam; in its
    first step only one, the prompt's, which several groups may share.
    """
    turns: dict[int, list[int]] = {}
    for i, state in enumerate(states):
        turns.setdefault(len(state.earlier), []).append(i)
    starts = np.asarray(first_rows, np.intp)
    for turn in sorted(turns):
        places = turns[turn]
        _advance([states[i] for i in places], scores, tokens, starts[places], keys)


def advance_merged(states: Sequence[BeamState], scores: np.ndarray, parents: np.ndarray, tokens: np.ndarray) -> None:
    """`advance_beams` where the device has taken the best of each group: [G, C] of these groups in this order, C at
    least every group's `num_candidates` (or all that there are, -1 for tokens where there are no more).

    Not for a first step, whose beams have one row in common, and not for diverse groups, whose turns come in between.
    """
    members = list(states)
    assert all(state.num_generated and not state.earlier for state in members), "these groups need advance_beams"
    batch = _batch_of(members)
    is_used = (tokens >= 0) & (np.arange(tokens.shape[1]) < batch.counts[:, None])
    candidates = Candidates(
        scores=np.where(is_used, scores, NOTHING),
        parents=np.where(is_used, parents, -1),
        tokens=np.where(is_used, tokens, -1),
        ends=np.zeros(is_used.shape, bool),
    )
    _decide(members, batch, candidates)


def _advance(
    states: list[BeamState], scores: np.ndarray, tokens: np.ndarray, first_rows: np.ndarray, keys: np.ndarray | None
) -> None:
    """`advance_beams` for groups of which none waits for another."""
    batch = _batch_of(states)
    lanes = np.arange(batch.beams.running_scores.shape[1])
    in_group = lanes < np.array([state.width for state in states])[:, None]
    is_first = batch.beams.num_generated == 0
    has_row = in_group & ~(is_first[:, None] & (lanes > 0))  # the beams of a prompt's row are one until a step has run
    rows = np.where(has_row, first_rows[:, None] + lanes, -1)
    if states[0].earlier:
        row_tokens = tokens[rows]
        cost = _diversity(states, row_tokens)
        # Keys change as sums do: a search that is not drawn is ranked by them, too, where another of the step is drawn.
        scores, keys = scores[rows] - cost, None if keys is None else keys[rows] - cost
        scores, tokens, keys = _in_row_order(scores, row_tokens, keys)
        rows = np.where(has_row, np.arange(rows.size).reshape(rows.shape), -1)
    _decide(states, batch, merge_candidates(scores, tokens, rows, batch.counts, keys))


def _decide(states: list[BeamState], batch: _Batch, candidates: Candidates) -> None:
    candidates = _at_least(candidates._replace(ends=_ends(states, candidates, batch.end_ids)), batch)
    selection = select_beams(batch.beams, candidates, batch.rules)
    batch = batch._replace(beams=selection.beams)
    for place, (state, is_done) in enumerate(zip(states, selection.is_done.tolist(), strict=True)):
        state._record(batch, place, selection, is_done)


def _at_least(candidates: Candidates, batch: _Batch) -> Candidates:
    """As many candidates as there are places, where the groups choose from fewer in this step."""
    missing = batch.beams.running_scores.shape[1] - candidates.scores.shape[1]
    if missing <= 0:
        return candidates
    fills = (NOTHING, -1, -1, False)
    padded = (
        np.pad(values, ((0, 0), (0, missing)), constant_values=fill)
        for values, fill in zip(candidates, fills, strict=True)
    )
    return Candidates(*padded)


def _diversity(states: list[BeamState], tokens: np.ndarray) -> np.ndarray:
    """f32[G, W, k]: how much each of tokens i32[G, W, k] costs, because earlier turns of its request chose it."""
    chosen: list[np.ndarray] = []
    span = int(tokens.max(initial=0)) + 1
    for place, state in enumerate(states):
        for other in state.earlier:
            if other.num_generated > state.num_generated:  # it was not done before this step
                mine = other.tokens[-1].astype(np.int64)
                chosen.append(mine[mine < span] + place * span)
    taken = np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)
    wanted = tokens + np.arange(len(states))[:, None, None] * span
    times = np.searchsorted(taken, wanted, "right") - np.searchsorted(taken, wanted, "left")
    strengths = np.array([state.diversity_penalty for state in states], np.float32)
    return strengths[:, None, None] * times.astype(np.float32)


def _in_row_order(
    scores: np.ndarray, tokens: np.ndarray, keys: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """[G, W, k] to [G * W, k], each row best first and by token among equals."""
    order = np.lexsort((tokens, -(scores if keys is None else keys)), axis=-1)

    def ordered(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, order, -1).reshape(-1, values.shape[-1])

    return ordered(scores), ordered(tokens), None if keys is None else ordered(keys)


def _ends(states: list[BeamState], candidates: Candidates, end_ids: np.ndarray) -> np.ndarray:
    """bool[G, M]: candidates whose token is an end id, or that complete a stop string or what limits them."""
    ends = (candidates.tokens[:, :, None] == end_ids[:, None, :]).any(-1)
    for place, state in enumerate(states):
        if state.find_stops is not None:
            used = candidates.tokens[place] >= 0
            ends[place, used] |= state.find_stops(candidates.parents[place, used], candidates.tokens[place, used])
        if state.places is not None:
            used = candidates.scores[place] > NOTHING  # the others are not allowed
            ends[place, used] |= state.places.ends(candidates.parents[place, used], candidates.tokens[place, used])
    return ends


def _start(state: BeamState) -> _Batch:
    """The batch of one group before its first step: one beam, and places for others."""
    shape = (1, max(state.widths))
    running_scores = np.full(shape, NOTHING)
    running_scores[:, 0] = 0
    nothing, numbers = np.full(shape, NOTHING), np.zeros(shape, np.int32)
    finished = Finished(nothing, np.zeros(shape, bool), nothing, numbers, numbers, numbers)
    rules = BeamRules(
        np.array([state.width], np.int32),
        np.array([state.max_tokens], np.int32),
        np.array([state.length_penalty], np.float64),
        np.array([state.early_stopping is True]),
        np.array([state.early_stopping == "never" and state.length_penalty > 0]),
        np.array([state.widths[-1]], np.int32),
    )
    beams = Beams(np.zeros(1, np.int32), running_scores, np.ones(1, bool), finished)
    ends = np.array([list(state.end_ids)], np.int32).reshape(1, -1)
    return _Batch(beams, rules, np.array([state.num_candidates], np.int32), ends)


def _batch_of(states: list[BeamState]) -> _Batch:
    """The states' arrays together: those of the last step if they were then the same groups, else gathered."""
    batch = _gathered(states)
    widths = np.array([state.next_width for state in states], np.int32)
    if (widths == batch.rules.widths).all():
        return batch
    counts = np.array([state.num_candidates for state in states], np.int32)
    return batch._replace(rules=batch.rules._replace(widths=widths), counts=counts)


def _gathered(states: list[BeamState]) -> _Batch:
    last = states[0]._batch
    if len(last.counts) == len(states) and all(s._batch is last and s._place == i for i, s in enumerate(states)):
        return last
    width = max(max(state.widths) for state in states)
    num_ends = max(len(state.end_ids) for state in states)

    def gather(arrays: list[np.ndarray]) -> np.ndarray:
        return np.array([array[state._place] for array, state in zip(arrays, states, strict=True)])

    def gather_wide(arrays: list[np.ndarray], size: int, fill: float | np.float32) -> np.ndarray:
        wide = np.full((len(states), size), fill, arrays[0].dtype)
        for i, (array, state) in enumerate(zip(arrays, states, strict=True)):
            row = array[state._place, :size]  # what is cut off is unused
            wide[i, : len(row)] = row
        return wide

    batches = [state._batch for state in states]
    pools = [batch.beams.finished for batch in batches]
    fills = (NOTHING, False, NOTHING, 0, 0, 0)
    finished = Finished(*(gather_wide([p[i] for p in pools], width, fill) for i, fill in enumerate(fills)))
    beams = Beams(
        gather([batch.beams.num_generated for batch in batches]),
        gather_wide([batch.beams.running_scores for batch in batches], width, NOTHING),
        gather([batch.beams.can_improve for batch in batches]),
        finished,
    )
    rules = BeamRules(*(gather([batch.rules[i] for batch in batches]) for i in range(len(BeamRules._fields))))
    return _Batch(
        beams, rules, gather([batch.counts for batch in batches]),
        gather_wide([batch.end_ids for batch in batches], num_ends, -2),
    )  # fmt: skip
