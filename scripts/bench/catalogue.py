"""A synthetic catalogue of items with semantic ids, as recommenders that generate give them: for the example and the
benchmark of constrained beams.

Each item has a code at each of `LEVELS` levels, the first the coarsest, and one more that tells apart the items whose
others are equal. Codes of a level are as unevenly used as clusters are. A code is a token: the last of a vocabulary.
"""

from __future__ import annotations

import numpy as np

from jaxpaged.constraints import Trie

LEVELS, CODES = 3, 256


class Catalogue:
    """Items of `LEVELS` + 1 tokens each.

    Attributes:
        items: i32[I, 4] tokens of each item.
    """

    def __init__(self, num_items: int, vocab_size: int, seed: int = 0):
        if vocab_size < (LEVELS + 1) * CODES:
            raise ValueError(f"{(LEVELS + 1) * CODES} tokens are codes, and the vocabulary has {vocab_size}")
        rng = np.random.default_rng(seed)
        codes = rng.zipf(1.3, (num_items, LEVELS)) * 97 % CODES  # few are used by many
        codes[:, 1:] += codes[:, :-1] * 31 + rng.integers(0, CODES // 2, (num_items, LEVELS - 1))
        codes %= CODES
        last = _number_among_equals(codes)
        kept = last < CODES  # what shares its codes with more is left out, as collisions are
        self.items = (
            np.column_stack([codes, last])[kept] + np.arange(LEVELS + 1) * CODES + vocab_size - (LEVELS + 1) * CODES
        ).astype(np.int32)

    def trie(self) -> Trie:
        return Trie.from_sequences(self.items)

    def histories(self, num_users: int, length: int, seed: int = 0) -> list[list[int]]:
        """Tokens of the items that each user has seen, the latest last."""
        seen = np.random.default_rng(seed).integers(0, len(self.items), (num_users, length))
        return self.items[seen].reshape(num_users, -1).tolist()


def _number_among_equals(codes: np.ndarray) -> np.ndarray:
    """i[I]: how many rows before are equal to each."""
    _, group = np.unique(codes, axis=0, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    numbers = np.arange(len(codes)) - np.repeat(starts, np.diff(np.append(starts, len(codes))))
    found = np.empty(len(codes), np.int64)
    found[order] = numbers
    return found
