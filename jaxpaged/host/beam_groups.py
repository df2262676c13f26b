"""Carries the decisions of a beam search out on sequences and their pages: fork the survivors, then free the others.

The first child of a beam that survives is that beam, one token longer: it keeps the pages. Further children fork from
it, which copies nothing; what they write to a shared last page later is copied then, once for each writer but one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxpaged.host.beam_state import BeamState, advance_beams
from jaxpaged.host.block_table import fork, release
from jaxpaged.host.page_allocator import PageAllocator
from jaxpaged.host.sequence import Sequence, SequenceGroup, SequenceStatus
from jaxpaged.step_io import RowCandidates


def advance_groups(
    groups: list[tuple[SequenceGroup, int]], candidates: RowCandidates, allocator: PageAllocator
) -> list[SequenceGroup]:
    """One step of every group, each with its first row among the candidates; returns the groups that are done."""
    if not groups:
        return []
    states, first_rows, children = [], [], []
    for group, row in groups:
        beams = group.sequences
        for state in group.running_beams:
            states.append(state)
            first_rows.append(row)
            if state.num_generated:
                children.append((state, beams[: state.width]))
                row, beams = row + state.width, beams[state.width :]
            else:
                children.append((state, beams * state.width))
    for group, _ in groups:
        if group.ends_text is not None:
            _watch_for_stops(group.ends_text, [child for child in children if child[0] in group.beams])
    advance_beams(states, candidates.scores, candidates.tokens, first_rows, candidates.keys)
    parents_of = iter(children)
    replaced = []
    for group, _ in groups:
        before = group.sequences
        ran = [next(parents_of) for _ in range(sum(1 for state in group.beams if not _was_done(state, states)))]
        group.sequences = _children(ran, allocator) or before[:1]
        replaced.append((group, before))
    for group, before in replaced:
        _release_losers(group, before, allocator)
        group.record_pages()
    return [group for group, _ in groups if not group.running_beams]


def _watch_for_stops(ends_text: Callable[[list[int]], bool], children: list[tuple[BeamState, list[Sequence]]]) -> None:
    for state, parents in children:

        def find_stops(of: np.ndarray, tokens: np.ndarray, parents=parents) -> np.ndarray:
            pairs = zip(of.tolist(), tokens.tolist(), strict=True)
            return np.array([ends_text([*parents[parent].output_ids, token]) for parent, token in pairs], bool)

        state.find_stops = find_stops


def _was_done(state: BeamState, ran: list[BeamState]) -> bool:
    return all(state is not other for other in ran)


def _children(ran: list[tuple[BeamState, list[Sequence]]], allocator: PageAllocator) -> list[Sequence]:
    """The running beams after a step, best first: of each parent the first child is the parent itself."""
    kept: set[int] = set()
    born: list[tuple[Sequence, int, float]] = []
    for state, parents in ran:
        if state.is_done:
            continue
        scores = state.running_scores.tolist()
        for parent, token, score in zip(state.parents[-1].tolist(), state.tokens[-1].tolist(), scores, strict=True):
            sequence = parents[parent]
            if id(sequence) in kept:
                sequence = _fork(sequence, allocator)
            else:
                kept.add(id(sequence))
            born.append((sequence, token, score))
    # Tokens are appended when all forks have been made: they copy their parent's as it was.
    for index, (sequence, token, score) in enumerate(born):
        sequence.token_ids.append(token)
        sequence.cumulative_logprob = score
        sequence.sample_index = index
    return [sequence for sequence, _, _ in born]


def _fork(sequence: Sequence, allocator: PageAllocator) -> Sequence:
    return Sequence(
        sequence.sample_index, sequence.token_ids[:], sequence.prompt_len, fork(sequence.table, allocator),
        sequence.num_computed, sequence.num_once_computed, SequenceStatus.RUNNING,
    )  # fmt: skip


def _release_losers(group: SequenceGroup, before: list[Sequence], allocator: PageAllocator) -> None:
    survivors = {id(sequence) for sequence in group.sequences} if group.running_beams else set()
    for sequence in reversed(before):
        if id(sequence) not in survivors:
            release(sequence.table, allocator)
            sequence.status = SequenceStatus.FINISHED
