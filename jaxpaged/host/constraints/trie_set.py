"""The tries of a run as one, as the device looks things up: FREE_NODE limits nothing, behind DEAD_NODE nothing comes.

A node of few children lists them; one of many has the bits of a vocabulary, so that what a step reads of it does not
depend on how many there are. Nodes with bits are few: each has more than MAX_LISTED edges of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from jaxpaged.api.trie import MAX_TOKEN, Trie
from jaxpaged.host.constraints.in_trie import TrieLimit
from jaxpaged.host.sequence import SequenceGroup
from jaxpaged.step_io import DEAD_NODE, FREE_NODE, TrieTables

#: Children up to which a node lists them.
MAX_LISTED = 256
#: The nodes FREE_NODE and DEAD_NODE; those of the tries come behind them.
NUM_FIXED = 2


@dataclass(frozen=True)
class TrieSet:
    """Different tries, in the order in which they stand in the tables."""

    tries: tuple[Trie, ...]

    @classmethod
    def of(cls, groups: Iterable[SequenceGroup]) -> TrieSet | None:
        """Those that limit some request; None where there are none."""
        found = dict.fromkeys(group.limit.trie for group in groups if isinstance(group.limit, TrieLimit))
        return cls(tuple(found)) if found else None

    def root(self, trie: Trie) -> int:
        place = self.tries.index(trie)
        return NUM_FIXED + sum(len(other.items) for other in self.tries[:place])

    def tables(self, vocab_size: int) -> TrieTables:
        """Sizes are rounded up to powers of two: a program is compiled for sizes, not for tries."""
        roots = [self.root(trie) for trie in self.tries]
        size = _power_of_two(NUM_FIXED + sum(len(trie.items) for trie in self.tries))
        first, counts, tokens = (np.zeros(size, np.int32) for _ in range(3))
        for trie, root in zip(self.tries, roots, strict=True):
            nodes = slice(root, root + len(trie.items))
            first[nodes] = trie.first_edges[:-1] + root + 1
            counts[nodes] = np.diff(trie.first_edges)
            tokens[root + 1 : nodes.stop] = trie.keys & MAX_TOKEN
        wide = np.flatnonzero(counts > MAX_LISTED)
        bits = np.zeros((_power_of_two(NUM_FIXED + len(wide)), -(-vocab_size // 32)), np.int32)
        bits[FREE_NODE] = -1
        bit_rows = np.full(size, DEAD_NODE, np.int32)
        bit_rows[FREE_NODE] = FREE_NODE
        bit_rows[wide] = np.arange(len(wide)) + NUM_FIXED
        for row, node in enumerate(wide.tolist(), start=NUM_FIXED):
            bits[row] = bits_of(tokens[first[node] : first[node] + counts[node]], vocab_size)
        listed = np.where(bit_rows == DEAD_NODE, counts, 0)
        places = np.arange(_power_of_two(max(1, int(listed.max()))), dtype=np.int32)
        return TrieTables(first, counts, tokens, bit_rows, bits, places)


def bits_of(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """i32[V / 32] with the bits of these tokens."""
    flags = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    flags[tokens] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
