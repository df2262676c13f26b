"""Beam search between two steps: which candidates run on, which are finished, and which searches are over.

The semantics are those of transformers 5, in float32 and in the order of its operations, so that tokens are equal and
scores differ by the model's rounding alone. In one step of one group of W beams

1. the M = max(2, 1 + number of end ids) * W best continuations of all beams are its candidates, by the sum of their
   log-probabilities; the lowest flat index, beam * vocabulary + token, goes first among equals (`merge_candidates`);
2. a candidate ends at an end id, a stop string, or the length at which all do;
3. the W best that do not end run on;
4. those that end and are among the first W candidates join the pool of finished ones, of which the W best are kept, by
   score = sum / generated length ** length_penalty, the older first among equals;
5. the search is over when no running beam can better the worst finished one, when the pool is full and
   `early_stopping` is True, or when every candidate has ended.

Where fewer than W continuations are possible, transformers fills the places of running beams up with what is none: with
beams that ended, and before the first step with W - 1 times the prompt. They lie 1e9 behind, but they join the pool
when nothing else does. Here a sum of -inf marks such a place: it is computed and never read, so that only what is
possible is ever found, and a search of which no running beam is left is over.

W may be another number in each step. Then it is that of the beams that the step leaves, and the finished ones are as
many as the last steps leave.

All functions take the groups of a step together: arrays `[G, W]` and `[G, M]`, as wide as the widest group, the unused
end of a narrower one masked. A finished hypothesis is a reference (step, parent, token); its tokens are read off the
parents of each step at the end (beam_state.py). Axes: G groups, W beams, M candidates, R rows of the step, k candidates
that the device kept of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NOT = np.float32(-1e30)  # added to what ended: what runs on goes first
NOTHING = np.float32(-np.inf)  # behind everything: what is forbidden, and unused places

#: Where that many times more values than wanted are to be ordered, the best are separated first.
_PRUNE_FACTOR = 8


class Candidates(NamedTuple):
    """The best continuations of each group: best first, or in the order in which they were drawn."""

    scores: np.ndarray  # f32[G, M]  sums of log-probabilities; -inf in unused places, and for what is forbidden
    parents: np.ndarray  # i32[G, M]  running beam that is continued
    tokens: np.ndarray  # i32[G, M]  -1 in unused places
    ends: np.ndarray  # bool[G, M]  ends the hypothesis, for another reason than its length


class Finished(NamedTuple):
    """The pools of finished hypotheses, best first."""

    scores: np.ndarray  # f32[G, W]  -inf in empty and in unused places
    is_finished: np.ndarray  # bool[G, W]
    sums: np.ndarray  # f32[G, W]  of log-probabilities
    steps: np.ndarray  # i32[G, W]  step, from 0, that chose the last token
    parents: np.ndarray  # i32[G, W]  running beam, before that step, that it continued
    tokens: np.ndarray  # i32[G, W]


class Beams(NamedTuple):
    """Where the searches stand between two steps."""

    num_generated: np.ndarray  # i32[G]
    running_scores: np.ndarray  # f32[G, W]  best first; -inf in places without a beam
    can_improve: np.ndarray  # bool[G]
    finished: Finished


class BeamRules(NamedTuple):
    """What each group's request asks for."""

    widths: np.ndarray  # i32[G]  beams that run on
    max_tokens: np.ndarray  # i32[G]  generated length at which every candidate ends
    length_penalties: np.ndarray  # f64[G]
    stops_when_full: np.ndarray  # bool[G]  early_stopping is True
    hopes_for_longest: np.ndarray  # bool[G]  early_stopping is "never", and length is rewarded
    kept: np.ndarray  # i32[G]  finished hypotheses


class Selection(NamedTuple):
    """What a step decided."""

    parents: np.ndarray  # i32[G, W]  running beam that each of the next ones continues; -1 in unused places
    tokens: np.ndarray  # i32[G, W]
    beams: Beams
    is_done: np.ndarray  # bool[G]


def num_candidates(width: int, num_ends: int) -> int:
    """Candidates of a group in a step: enough that `width` remain when every beam's ends are among them."""
    return max(2, 1 + num_ends) * width


def select_beams(beams: Beams, candidates: Candidates, rules: BeamRules) -> Selection:
    """One step of every group. M must be at least W; a group that is done may be given again and stays as it is."""
    width = beams.running_scores.shape[1]
    in_group = np.arange(width) < rules.widths[:, None]  # [G, W]
    in_pool = np.arange(width) < rules.kept[:, None]
    generated = beams.num_generated + 1
    ends = candidates.ends | (generated >= rules.max_tokens)[:, None]

    next_scores = candidates.scores + np.where(ends, NOT, np.float32(0))
    best = _flat(_best(next_scores, width), next_scores.shape[1])
    is_possible = next_scores.take(best) > NOTHING
    running_scores = np.where(in_group & is_possible & ~ends.take(best), next_scores.take(best), NOTHING)
    chosen = np.where(is_possible, best, best[:, :1])  # a place without a beam computes what the best one does

    finished = _update_finished(beams, candidates, ends, generated, rules, in_pool)
    can_improve = beams.can_improve & _may_improve(running_scores[:, 0], finished, generated, rules, in_pool)
    is_full = (finished.is_finished | ~in_pool).all(1)
    return Selection(
        parents=np.where(in_group, candidates.parents.take(chosen), -1),
        tokens=np.where(in_group, candidates.tokens.take(chosen), -1),
        beams=Beams(generated, running_scores, can_improve, finished),
        is_done=~can_improve | (rules.stops_when_full & is_full) | (running_scores[:, 0] == NOTHING),
    )


def _update_finished(
    beams: Beams,
    candidates: Candidates,
    ends: np.ndarray,
    generated: np.ndarray,
    rules: BeamRules,
    in_pool: np.ndarray,
) -> Finished:
    """The pools with the candidates that ended among the first W; nothing joins where the search is over."""
    width, count = in_pool.shape[1], candidates.scores.shape[1]
    old = beams.finished
    is_open = beams.can_improve & ~(rules.stops_when_full & (old.is_finished | ~in_pool).all(1))
    joins = ends & is_open[:, None] & (np.arange(count) < rules.widths[:, None]) & (candidates.scores > NOTHING)
    if not joins.any():
        return old
    scores = np.where(joins, candidates.scores / _length_divisor(generated, rules)[:, None], NOTHING)
    steps = np.broadcast_to(beams.num_generated[:, None], scores.shape)
    new = Finished(scores, joins, candidates.scores, steps, candidates.parents, candidates.tokens)

    both = Finished(*(np.concatenate(pair, axis=1) for pair in zip(old, new, strict=True)))
    best = _flat(_best(both.scores, width), both.scores.shape[1])
    kept = Finished(*(values.take(best) for values in both))
    return kept._replace(scores=np.where(in_pool, kept.scores, NOTHING), is_finished=kept.is_finished & in_pool)


def _may_improve(
    best_running: np.ndarray, finished: Finished, generated: np.ndarray, rules: BeamRules, in_pool: np.ndarray
) -> np.ndarray:
    """bool[G]: can the best running beam, at the length hoped for, beat the worst finished one or fill a place?"""
    longest = np.where(rules.hopes_for_longest, rules.max_tokens, generated)
    hoped = best_running / _length_divisor(longest, rules)
    worst = np.where(in_pool, finished.scores, np.inf).min(1)
    has_empty = (in_pool & ~finished.is_finished).any(1)
    return (finished.is_finished.any(1) & (hoped > worst)) | (has_empty & (hoped > NOTHING))


def _length_divisor(lengths: np.ndarray, rules: BeamRules) -> np.ndarray:
    """f32[G]: length ** length_penalty; the power is taken in float64, as Python takes it."""
    return np.power(lengths.astype(np.float64), rules.length_penalties).astype(np.float32)


def _flat(places: np.ndarray, size: int) -> np.ndarray:
    """Places [G, n] in rows of `size` values as indices into all of them, with which several arrays are taken from."""
    return places + np.arange(0, len(places) * size, size)[:, None]


def _take(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    return values.take(_flat(places, values.shape[1]))


def _best(values: np.ndarray, count: int) -> np.ndarray:
    """Places [G, count] of the largest of values [G, n], largest first, the first place first among equals."""
    if values.shape[1] >= _PRUNE_FACTOR * count:
        # Whatever reaches the count-th largest value, in its order; almost always that many, more only where many tie.
        bound = np.partition(values, -count, axis=1)[:, -count, None]
        reaches = values >= bound
        most = int(reaches.sum(1).max())
        if most * 2 < values.shape[1]:
            places = np.argsort(~reaches, axis=1, kind="stable")[:, :most]
            return _take(places, _best_of_all(_take(values, places), count))
    return _best_of_all(values, count)


def _best_of_all(values: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-values, axis=1, kind="stable")[:, :count]


def merge_candidates(
    scores: np.ndarray, tokens: np.ndarray, rows: np.ndarray, counts: np.ndarray, keys: np.ndarray | None = None
) -> Candidates:
    """The best `counts[g]` candidates of each group out of the best k of each row, with nothing marked as an end.

    scores f32[R, k] are sums (log-probability plus the running beam's sum, added before the k best are taken: adding
    rounds, and what was in order may tie). tokens i32[R, k]. Equal scores of a row must come in order of token, as
    `lax.top_k` leaves them. rows i32[G, W] has the row of each running beam, -1 behind the group's last; k must be at
    least min(counts[g], V) for the result to be that of all W * V continuations. With keys f32[R, k] the order is by
    key, and k must serve the keys: scores plus Gumbel noise draw without replacement in proportion to exp(score).
    """
    rows = rows[:, : max(1, int((rows >= 0).sum(1).max()))]  # before the first step there is one row, for all beams
    num_groups, k = len(rows), scores.shape[1]
    ranked = np.where((rows >= 0)[:, :, None], (scores if keys is None else keys)[rows], NOTHING)
    places = _best(ranked.reshape(num_groups, -1), int(counts.max()))
    parents, rank = np.divmod(places, k)
    row = _take(rows, parents)
    is_used = (row >= 0) & (np.arange(places.shape[1]) < counts[:, None])
    return Candidates(
        scores=np.where(is_used, scores[row, rank], NOTHING),
        parents=np.where(is_used, parents, -1).astype(np.int32),
        tokens=np.where(is_used, tokens[row, rank], -1),
        ends=np.zeros(places.shape, bool),
    )
