"""Samples and beams in a trie: a node each, which the device can follow by itself (device/constraints.py)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxpaged.api.trie import Trie


class TriePlace:
    """One sample's node."""

    __slots__ = ("node", "trie")

    def __init__(self, trie: Trie):
        self.trie, self.node = trie, 0

    def push(self, token_id: int) -> None:
        self.node = self.trie.child(self.node, token_id) if self.node >= 0 else -1

    @property
    def is_over(self) -> bool:
        edges = self.trie.first_edges
        return self.node >= 0 and bool(edges[self.node] == edges[self.node + 1])


class TrieBeams:
    """The nodes i64[W] of a search's beams."""

    def __init__(self, trie: Trie, width: int):
        self.trie, self.nodes = trie, np.zeros(width, np.int64)

    def ends(self, parents: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return self.trie.is_leaf(self.trie.advance(self.nodes[parents], tokens))

    def advance(self, parents: np.ndarray, tokens: np.ndarray) -> None:
        self.nodes = self.trie.advance(self.nodes[parents], tokens)


@dataclass(frozen=True, eq=False)
class TrieLimit:
    """A request's trie, in which every output ends at a leaf."""

    trie: Trie

    def first_tokens(self, vocab_size: int) -> np.ndarray:
        return self.trie.first_tokens()

    def begin(self) -> TriePlace:
        return TriePlace(self.trie)

    def begin_beams(self, width: int) -> TrieBeams:
        return TrieBeams(self.trie, width)

    def is_complete(self, output_ids: list[int]) -> bool:
        place = self.begin()
        for token_id in output_ids:
            place.push(token_id)
        return place.is_over
