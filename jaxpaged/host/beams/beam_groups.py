"""Carries the decisions of a beam search out on sequences and their pages: fork the survivors, free the others.

The first child of a beam that survives is that beam, one token longer: it keeps the pages. Further children fork from
it, which copies nothing; what they write to a shared last page later is copied then, once for each writer but one. As
many beams have no child as there are further children, and these take their places: sequences of one search have most
of their pages in common, so little of a table changes. Where nothing asks for single beams, their tables are one array,
and there are no sequences (gathering.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxpaged.host.beams.beam_logprobs import keep_group, keep_rows
from jaxpaged.host.beams.beam_state import BeamState, FindStops, advance_beams, advance_merged
from jaxpaged.host.beams.gathering import can_gather, gather
from jaxpaged.host.failure import fail
from jaxpaged.host.pages.beam_tables import BeamTables
from jaxpaged.host.sequence import Sequence, SequenceGroup, SequenceStatus
from jaxpaged.host.systems.reservation import Paged
from jaxpaged.host.systems.roles import Forks
from jaxpaged.step_io import NO_TOKEN, GroupCandidates, StepOutputs


class GroupRows(NamedTuple):
    """Where one request's searches are in a step."""

    group: SequenceGroup
    row: int  # of its first beam
    place: int  # of its first search among all of the step


class _Search(NamedTuple):
    """One group of beams in one step."""

    state: BeamState
    parents: list[Sequence]  # of each running beam; in the first step all are the prompt; none where beams are arrays
    first_row: int  # among the step's candidates
    place: int  # among the step's searches


def advance_groups(
    groups: list[GroupRows], outputs: StepOutputs, policy: Forks, gathers: bool = False
) -> tuple[list[SequenceGroup], bool]:
    """One step of every group. `gathers`: beams go on as arrays where they can (gathering.py); `policy` has pages then.

    Returns the groups that are done, and whether any group's sequences are no longer the same.
    """
    searches = [(one.group, _searches(one)) for one in groups]
    _find_failures(searches, outputs)
    for group, of_group in searches:
        _note_growth(group, policy)
        if group.ends_text is not None:
            for search in of_group:
                search.state.find_stops = _stop_finder(search.parents, group.ends_text)
    _advance(searches, outputs)
    for group, _ in searches:
        if not (group.failure or group.running_beams or any(state.has_found for state in group.beams)):
            group.failure = NO_TOKEN
    is_changed = [_go_on(group, of_group, policy, gathers) for group, of_group in searches]
    return [group for group, _ in searches if not group.running_beams], any(is_changed)


def _searches(where: GroupRows) -> list[_Search]:
    """The searches of a request that are not done: their beams, and so their rows, lie side by side."""
    group, row, first_place = where
    if group.tables is not None:
        return [_Search(group.beams[0], [], row, first_place)]
    found, beams = [], group.sequences
    for place, state in enumerate(group.running_beams, first_place):
        if state.num_generated:
            found.append(_Search(state, beams[: state.width], row, place))
            row, beams = row + state.width, beams[state.width :]
        else:
            found.append(_Search(state, beams * state.width, row, place))
    return found


def _go_on(group: SequenceGroup, searches: list[_Search], policy: Forks, gathers: bool) -> bool:
    """Carry the step's decisions out; whether the group's sequences are no longer the same."""
    if group.failure:
        return _fail(group, searches, policy)
    if group.tables is not None:
        return _descend_gathered(group)
    if gathers and can_gather(group):
        assert isinstance(policy, Paged), "beams are gathered over pages alone"
        if searches[0].state.num_generated > 1:
            gather(group, policy.allocator)
        elif not searches[0].state.is_done:
            group.tables = BeamTables.fork(group.sequences[0].table, searches[0].state.width, policy.allocator)
            group.pages.note(group.tables.physical, group.tables.logical)
            return True
        else:
            return _carry_out(group, searches, policy)
        _descend_gathered(group)
        return True
    return _carry_out(group, searches, policy)


def _descend_gathered(group: SequenceGroup) -> bool:
    (state,), tables = group.beams, group.tables
    assert tables is not None
    if state.is_done:
        tables.release()
        group.tables = None
        group.sequences[0].status = SequenceStatus.FINISHED
        return True
    has_followed = tables.num_in_flight > 1  # and that step makes these copies
    is_changed = len(state.parents[-1]) != tables.width
    tables.descend(state.parents[-1])
    if has_followed:
        group.pages.copied += tables.copies.shape[1]
    group.pages.note(tables.physical, tables.logical)
    return is_changed


def _find_failures(searches: list[tuple[SequenceGroup, list[_Search]]], outputs: StepOutputs) -> None:
    """Mark the requests of which some beam can choose nothing, because numbers are not finite."""
    assert outputs.candidates is not None, "beams ran, but no candidates came"
    codes = np.minimum(outputs.candidates.tokens[:, 0], NO_TOKEN)  # a row or group that fails says so in every place
    if codes.min() == NO_TOKEN:
        return
    is_merged = isinstance(outputs.candidates, GroupCandidates)
    running = [(group, search) for group, of_group in searches for search in of_group]
    for group, (state, _, row, place) in running:
        num_rows = state.width if state.num_generated else 1
        code = codes[place] if is_merged else codes[row : row + num_rows].min()
        if code < NO_TOKEN:
            group.failure = int(code)


def _note_growth(group: SequenceGroup, policy: Forks) -> None:
    """The most pages that the group holds: what the step wrote is there, and nothing is freed yet.

    Of shared pages counted anew only where the tables were made anew, or give pages back while they grow. Beams are of
    one length, so either all took a page or none.
    """
    pages, page_size = group.pages, policy.page_size
    if group.tables is not None:
        group.record_pages()
        return
    is_counted = policy.shares_pages and group.is_forked and policy.window is None
    if not is_counted or group.num_preemptions != group.counted_preemptions:
        group.record_pages()
        group.counted_preemptions = group.num_preemptions
    else:
        table = group.sequences[0].table
        takes_page = table.num_slots % page_size == 1 % page_size
        grown = len(group.sequences) if takes_page else pages.copied - group.counted_copies
        pages.note(pages.physical + grown, len(group.sequences) * len(table.pages))
    group.counted_copies = pages.copied


def _stop_finder(parents: list[Sequence], ends_text: Callable[[list[int]], bool]) -> FindStops:
    def find_stops(beams: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        pairs = zip(beams.tolist(), tokens.tolist(), strict=True)
        return np.array([ends_text([*parents[beam].output_ids, token]) for beam, token in pairs], bool)

    return find_stops


def _advance(searches: list[tuple[SequenceGroup, list[_Search]]], outputs: StepOutputs) -> None:
    """Let all searches choose, and keep what the step said of their tokens where a request wants to know."""
    candidates = outputs.candidates
    running = [(group, search) for group, of_group in searches for search in of_group if not group.failure]
    states = [search.state for _, search in running]
    if not states:
        return
    if isinstance(candidates, GroupCandidates):
        for group, search in running:
            if group.params.logprobs is not None:
                keep_group(search.state, candidates, outputs.token_logprobs, search.place, search.first_row)
        places = [search.place for _, search in running]
        advance_merged(states, candidates.scores[places], candidates.parents[places], candidates.tokens[places])
        return
    assert candidates is not None, "beams ran, but no candidates came"
    for group, search in running:
        if group.params.logprobs is not None:
            keep_rows(search.state, candidates, outputs.token_logprobs, search.first_row)
    first_rows = [search.first_row for _, search in running]
    advance_beams(states, candidates.scores, candidates.tokens, first_rows, candidates.keys)


def _fail(group: SequenceGroup, searches: list[_Search], policy: Forks) -> bool:
    """End a request that cannot go on; the sequence that stays is the best beam, as it was."""
    if group.tables is not None:
        group.sequences[0].token_ids += searches[0].state.best_token_ids()
    fail(group, policy)
    group.tables, group.sequences = None, group.sequences[:1]
    group.sequences[0].cumulative_logprob = searches[0].state.last_score
    return True


def _carry_out(group: SequenceGroup, searches: list[_Search], policy: Forks) -> bool:
    """Make the group's sequences its beams after the step; whether they are no longer the same sequences.

    While they are, each stays where it is and its contents change: beams in their order, best first.
    """
    if searches[0].state.num_generated == 1:
        freed = _begin(group, searches, policy)
    else:
        freed = sum(_descend(search, policy) for search in searches)
    running = [(state, parents) for state, parents, _, _ in searches if not state.is_done]
    num_rows = sum(state.width for state, _ in running)
    is_changed = num_rows != len(group.sequences) or searches[0].state.num_generated == 1
    if is_changed:
        children = [sequence for _, parents in running for sequence in parents]
        for index, sequence in enumerate(children):
            sequence.sample_index = index
        # Of a group that is done one sequence stays, without pages: it knows the prompt.
        group.sequences = children or group.sequences[:1]
    # Tokens are appended when all forks have been made: they copy their parent's as it was.
    for state, parents in running:
        for sequence, token in zip(parents, state.tokens[-1].tolist(), strict=True):
            sequence.token_ids.append(token)
    if policy.shares_pages:
        group.pages.note(group.pages.physical - freed, num_rows * len(group.sequences[0].table.held))
    return is_changed


def _begin(group: SequenceGroup, searches: list[_Search], policy: Forks) -> int:
    """Fork the first beams of all searches from the prompt's sequence, which is one of them; returns pages freed."""
    (prompt,) = group.sequences
    is_taken = False
    for state, parents, _, _ in searches:
        for place in range(0 if state.is_done else state.width):
            parents[place] = _fork(prompt, policy) if is_taken else prompt
            is_taken = True
    return 0 if is_taken else _finish([prompt], policy)


def _descend(search: _Search, policy: Forks) -> int:
    """Give every sequence of a search the contents of its next beam; returns how many pages became free."""
    state, sequences, _, _ = search
    if state.is_done:
        return _finish(sequences, policy)
    places = state.parents[-1].tolist()
    contents = [(sequence.table, sequence.token_ids) for sequence in sequences]
    added = [_fork(sequences[place], policy) for place in places[len(sequences) :]]
    dropped, sequences[len(places) :] = sequences[len(places) :], []
    places = places[: len(sequences)]
    childless = [contents[place] for place in set(range(len(contents))).difference(places)]
    is_kept = bytearray(len(contents))
    freed = 0
    for sequence, place in zip(sequences, places, strict=True):
        table, token_ids = contents[place]
        if is_kept[place]:
            parent_table, parent_ids = table, token_ids
            table, token_ids = childless.pop()
            common, newly_freed = policy.refork(table, parent_table)
            freed += newly_freed
            start = common * policy.page_size  # what common pages hold are common tokens
            token_ids[start:] = parent_ids[start:]
        is_kept[place] = True
        sequence.table, sequence.token_ids = table, token_ids
    for sequence in dropped:
        freed += policy.release(childless.pop()[0])
        sequence.status = SequenceStatus.FINISHED
    sequences += added
    return freed


def _fork(sequence: Sequence, policy: Forks) -> Sequence:
    return Sequence(
        sequence.sample_index, sequence.token_ids[:], sequence.prompt_len, policy.fork(sequence.table),
        sequence.num_computed, sequence.num_once_computed, SequenceStatus.RUNNING,
    )  # fmt: skip


def _finish(sequences: list[Sequence], policy: Forks) -> int:
    """Free the beams of a search that is done; returns how many pages became free."""
    freed = 0
    for sequence in reversed(sequences):
        freed += policy.release(sequence.table)
        sequence.status = SequenceStatus.FINISHED
    return freed
