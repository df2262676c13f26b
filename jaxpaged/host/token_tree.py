"""Rebuilding a preempted group: which of its sequences can share pages, judged by their tokens alone.

KV of a position depends only on the tokens up to it, so sequences with a common token prefix can share the pages of
that prefix, whatever they shared before. Only full pages are shared: the group is recomputed in one pass, and a page
that one sequence is still filling cannot be copied for another before it is filled.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxpaged.host.block_table import num_pages_for
from jaxpaged.host.sequence import Sequence


class Branch(NamedTuple):
    """`sequence` takes its first `num_shared_pages` pages from the branch before it and computes the rest."""

    sequence: Sequence
    num_shared_pages: int


def build_branches(sequences: list[Sequence], page_size: int) -> list[Branch]:
    """Order the sequences so that each shares its longest common prefix with the one before it.

    In lexicographic order of tokens that neighbour has the longest common prefix of all that come earlier. At least the
    last token of every sequence is computed, since its logits choose the next.
    """
    ordered = sorted(sequences, key=lambda sequence: sequence.token_ids)
    branches = [Branch(ordered[0], 0)]
    for before, sequence in zip(ordered, ordered[1:], strict=False):
        common = _common_prefix_len(before.token_ids, sequence.token_ids)
        branches.append(Branch(sequence, min(common, sequence.num_tokens - 1) // page_size))
    return branches


def num_pages_of(branches: list[Branch], page_size: int) -> int:
    """Pages that the group's tokens take, shared ones counted once."""
    return sum(num_pages_for(branch.sequence.num_tokens, page_size) - branch.num_shared_pages for branch in branches)


def _common_prefix_len(a: list[int], b: list[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
