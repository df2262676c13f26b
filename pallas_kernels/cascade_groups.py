"""Which rows of a decode step read the same pages. Imports no jax, so that whoever plans it needs none either."""

from __future__ import annotations

from typing import Any, NamedTuple


class CascadeGroups(NamedTuple):
    """Runs of full pages that several rows of a decode step have in common, each to be read once for all its rows.

    A row belongs to one group at most at each level. Its run of level 1 starts where that of level 0 ends (first the
    prompt, then what some beams have in common), or at its first page if it has none there; from `own_starts` on it
    reads alone. V groups of M members at most, L levels; padding groups stand behind the others.
    """

    members: Any  # i32[V, M] rows whose queries are stacked, padded with -1; a padding group has only -1
    first_pages: Any  # i32[V] index into the members' block tables where the common run starts
    num_pages: Any  # i32[V] length of the run in pages; 0 for a padding group
    own_starts: Any  # i32[B] first token position that the row reads alone, a multiple of the page size
    parts: Any  # i32[L, B] group * M + column of the row in its group at that level, -1: in none
