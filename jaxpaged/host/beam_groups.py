"""Carries the decisions of a beam search out on sequences and their pages: fork the survivors, then free the others.

The first child of a beam that survives is that beam, one token longer: it keeps the pages. Further children fork from
it, which copies nothing; what they write to a shared last page later is copied then, once for each writer but one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxpaged.host.beam_state import BeamState, FindStops, advance_beams
from jaxpaged.host.reservation import Policy
from jaxpaged.host.sequence import Sequence, SequenceGroup, SequenceStatus
from jaxpaged.step_io import RowCandidates


class _Search(NamedTuple):
    """One group of beams in one step."""

    state: BeamState
    parents: list[Sequence]  # of each running beam; in the first step all are the prompt
    first_row: int  # among the step's candidates


def advance_groups(
    groups: list[tuple[SequenceGroup, int]], candidates: RowCandidates, policy: Policy
) -> list[SequenceGroup]:
    """One step of every group, each with its first row among the candidates; returns the groups that are done."""
    searches = {group: _searches(group, row) for group, row in groups}
    for group, of_group in searches.items():
        group.record_pages()  # the most that it holds: what this step wrote is there, and nothing freed yet
        if group.ends_text is not None:
            for search in of_group:
                search.state.find_stops = _stop_finder(search.parents, group.ends_text)
    running = [search for of_group in searches.values() for search in of_group]
    if running:
        first_rows = [search.first_row for search in running]
        advance_beams(
            [search.state for search in running], candidates.scores, candidates.tokens, first_rows, candidates.keys
        )
    parents = {group: group.sequences for group in searches}
    for group, of_group in searches.items():
        group.sequences = _children(of_group, policy)
    for group, sequences in parents.items():
        _release_losers(group, sequences, policy)
    return [group for group in searches if not group.running_beams]


def _searches(group: SequenceGroup, row: int) -> list[_Search]:
    """The searches of a request that are not done: their beams, and so their rows, lie side by side."""
    found, beams = [], group.sequences
    for state in group.running_beams:
        if state.num_generated:
            found.append(_Search(state, beams[: state.width], row))
            row, beams = row + state.width, beams[state.width :]
        else:
            found.append(_Search(state, beams * state.width, row))
    return found


def _stop_finder(parents: list[Sequence], ends_text: Callable[[list[int]], bool]) -> FindStops:
    def find_stops(beams: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        pairs = zip(beams.tolist(), tokens.tolist(), strict=True)
        return np.array([ends_text([*parents[beam].output_ids, token]) for beam, token in pairs], bool)

    return find_stops


def _children(searches: list[_Search], policy: Policy) -> list[Sequence]:
    """The running beams after a step, best first: of each parent the first child is the parent itself."""
    kept: set[Sequence] = set()
    born: list[tuple[Sequence, int, float]] = []
    for state, parents, _ in searches:
        if state.is_done:
            continue
        scores = state.running_scores.tolist()
        for parent, token, score in zip(state.parents[-1].tolist(), state.tokens[-1].tolist(), scores, strict=True):
            sequence = parents[parent]
            if sequence in kept:
                sequence = _fork(sequence, policy)
            kept.add(sequence)
            born.append((sequence, token, score))
    # Tokens are appended when all forks have been made: they copy their parent's as it was.
    for index, (sequence, token, score) in enumerate(born):
        sequence.token_ids.append(token)
        sequence.cumulative_logprob = score
        sequence.sample_index = index
    return [sequence for sequence, _, _ in born]


def _fork(sequence: Sequence, policy: Policy) -> Sequence:
    return Sequence(
        sequence.sample_index, sequence.token_ids[:], sequence.prompt_len, policy.fork(sequence.table),
        sequence.num_computed, sequence.num_once_computed, SequenceStatus.RUNNING,
    )  # fmt: skip


def _release_losers(group: SequenceGroup, parents: list[Sequence], policy: Policy) -> None:
    """Free the beams that have no child. Of a group that is done one stays, without pages: it knows the prompt."""
    survivors = set(group.sequences)
    for sequence in reversed(parents):
        if sequence not in survivors:
            policy.release(sequence.table)
            sequence.status = SequenceStatus.FINISHED
    group.record_pages()
    group.sequences = group.sequences or parents[:1]
