"""Rebuilding a preempted group: which of its sequences can share pages, judged by their tokens alone.

KV of a position depends only on the tokens up to it, so sequences with a common token prefix can share the pages of
that prefix, whatever they shared before. The group is recomputed in one pass, and a page that one sequence is still
filling cannot be copied for another before it is filled: so a part-filled page is shared only where the other has
nothing to add to it. That is the case of beams of one parent: they differ in their last tokens, which are not
recomputed. A group of beams comes back sharing all that it shared.

A prefix that the whole run shares is filled before, so all of its tokens are shared, whether its last page is full or
not (shared_prefix.py). And full pages that are known by their tokens, whoever filled them, are found (known_pages.py).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from jaxpaged.host.pages.block_table import num_pages_for
from jaxpaged.host.sequence import Sequence, SequenceGroup


class SequencePlacement(NamedTuple):
    """`sequence` shares its first positions with the one before it, the run's prefix, or whoever filled the pages that
    were found, and computes the rest."""

    sequence: Sequence
    num_shared: int  # token positions: full pages, or all that there are to compute; the run's prefix: all of it
    num_to_compute: int  # behind those
    found: SequenceOf[int] = ()  # pages that hold all that is shared; none: the one before it, or the prefix, has them


def _find_nothing(sequence: Sequence) -> list[int]:
    return []


def plan_placements(
    group: SequenceGroup, page_size: int, find: Callable[[Sequence], list[int]] = _find_nothing
) -> list[SequencePlacement]:
    """Order the sequences so that each shares its longest common prefix with the one before it.

    In lexicographic order of tokens that neighbour has the longest common prefix of all that come earlier. Where a
    prefill has to give logits, the last token of every sequence is computed. Nobody shares less than the run's prefix.
    `find` says which pages hold a sequence's first tokens; where it finds more than the neighbour has, these are taken.
    Then those that the neighbour has are among them, since it has found them too.
    """
    ordered = sorted(group.unfinished, key=lambda sequence: sequence.token_ids)
    placements: list[SequencePlacement] = []
    before: list[int] = []
    for sequence in ordered:
        count = group.num_to_prefill(sequence)
        shared = min(_common_prefix_len(before, sequence.token_ids), sequence.num_tokens - 1)
        shared = count if shared >= count else max(shared // page_size * page_size, group.prefix_len)
        found = find(sequence)
        if len(found) * page_size > shared:
            shared = len(found) * page_size
            placements.append(SequencePlacement(sequence, shared, count - shared, found))
        else:
            placements.append(SequencePlacement(sequence, shared, count - shared))
        before = sequence.token_ids
    return placements


def num_pages_of(placements: list[SequencePlacement], page_size: int) -> int:
    """Pages that the group's tokens take, shared ones counted once, those of the run's prefix not at all.

    A part-filled page is copied by who adds to it.
    """
    computing = [(shared, count) for _, shared, count, _ in placements if count]
    return sum(num_pages_for(shared + count, page_size) - shared // page_size for shared, count in computing)


def num_tokens_to_compute(placements: list[SequencePlacement]) -> int:
    return sum(placement.num_to_compute for placement in placements)


def _common_prefix_len(a: list[int], b: list[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
