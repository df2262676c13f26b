"""A trie of token sequences, as arrays: which items there are, and what may come behind the beginning of one.

Nodes are numbered level by level from the root, 0, and within a level by parent and token. So the children of a node
lie side by side, in order of their tokens, and node e + 1 is what edge e leads to. Two arrays say it all: the edges'
keys, parent * 2**32 + token, which are in order, and each node's first edge. Making them takes a sort a level.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from jaxpaged.api.constraint import Constraint
from jaxpaged.api.values import as_int, is_list, shortened, unpacked

#: Tokens are less, so that a node and a token make a key.
MAX_TOKEN = 2**31 - 1
#: Forms of a trie that are kept: requests that end in different ways, or not before another length, need others.
MAX_FORMS = 4


class Trie(Constraint):
    """Token sequences, *items*, of which an output is to be one: `Trie.from_sequences(...)`.

    An output ends with the last token of an item, without an end-of-sequence. Where an item is the beginning of
    another, it ends by an end-of-sequence or stop token, or goes on.

    Attributes:
        first_edges: i32[N + 1] the first edge out of each node, and behind the last one's the number of edges.
        keys: i64[N - 1] of each edge, in order.
        items: i32[N] number of the (first) item that ends at a node; -1 where none does.
    """

    def __init__(self, tokens: np.ndarray, lengths: np.ndarray):
        """tokens i32[...] of all items end to end; lengths i64[I], none of them 0. For `from_sequences`."""
        self._tokens, self._lengths = tokens, lengths
        self.keys, ends = _levels(tokens, lengths)
        self.items = np.full(len(self.keys) + 1, -1, np.int32)
        self.items[ends[::-1]] = np.arange(len(ends), dtype=np.int32)[::-1]  # of equal items the first stays
        counts = np.bincount(self.keys >> 32, minlength=len(self.items))
        self.first_edges = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        self._forms = WeakValueDictionary[tuple[frozenset[int], int], Trie]()  # all that somebody has
        self._latest = deque[Trie](maxlen=MAX_FORMS)

    @classmethod
    def from_sequences(cls, sequences: Any) -> Trie:
        """Of lists of token ids, or an array [items, length]; ValueError, with the item's number, for what is none.

        Millions of items take seconds. Items that are there twice count once.
        """
        return cls(*_read(sequences))

    @property
    def num_items(self) -> int:
        """Different ones."""
        return int((self.items >= 0).sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest item."""
        return int(self._lengths.max())

    def __repr__(self) -> str:
        return f"<Trie of {self.num_items} items>"

    def find(self, token_ids: Iterable[int]) -> int | None:
        """The number of this item, among those that were given; None where it is none."""
        node = 0
        for token_id in token_ids:
            node = self.child(node, token_id)
            if node < 0:
                return None
        return None if self.items[node] < 0 else int(self.items[node])

    def child(self, node: int, token: int) -> int:
        """The node behind a token; -1 where there is none."""
        wanted = (node << 32) + token
        edge = int(self.keys.searchsorted(wanted)) if 0 <= token <= MAX_TOKEN else len(self.keys)
        return edge + 1 if edge < len(self.keys) and self.keys[edge] == wanted else -1

    def advance(self, nodes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """i64[R]: the nodes behind these tokens i[R]; -1 where there are none."""
        wanted = (np.asarray(nodes, np.int64) << 32) + tokens
        edges = np.searchsorted(self.keys, wanted)
        is_there = (tokens >= 0) & (self.keys[np.minimum(edges, len(self.keys) - 1)] == wanted)
        return np.where(is_there, edges + 1, -1)

    def is_leaf(self, nodes: np.ndarray) -> np.ndarray:
        """bool[R]: whether an item ends at each of these nodes, and none goes on; False for -1."""
        return (nodes >= 0) & (self.first_edges[nodes] == self.first_edges[nodes + 1])

    def first_tokens(self) -> np.ndarray:
        """i64[C]: what an output may begin with."""
        return self.keys[: self.first_edges[1]] & MAX_TOKEN

    def check_tokens(self, vocab_size: int) -> None:
        """Raise ValueError where an item has a token that the vocabulary does not have."""
        place = int(self._tokens.argmax())
        if self._tokens[place] >= vocab_size:
            raise ValueError(
                f"item {self._item_at(place)} of the trie has token id {self._tokens[place]}; the vocabulary has ids "
                f"0 to {vocab_size - 1}"
            )

    def check_lengths(self, room: int) -> None:
        """Raise ValueError where an item is longer than an output may be."""
        if self.longest > room:
            raise ValueError(
                f"item {int(self._lengths.argmax())} of the trie has {self.longest} tokens, and an output at most "
                f"{room}: raise max_tokens (and max_model_len, if that is the limit), or leave out longer items"
            )

    def with_ends(self, ends: frozenset[int], min_tokens: int = 0) -> Trie:
        """This trie for a request that ends at these tokens: every output ends at a leaf.

        An item that is the beginning of another may end by each of `ends`, which become its children. Items of fewer
        than `min_tokens` tokens are left out, since no end may come before. ValueError, with an item's number, where
        that leaves nothing, or an item could not end, or would end too early.
        """
        form = ends, min_tokens
        found = self._forms.get(form)
        if found is None:
            found = self._forms[form] = self._made_with(ends, min_tokens)
        if found is not self and found not in self._latest:
            self._latest.append(found)
        return found

    def _made_with(self, ends: frozenset[int], min_tokens: int) -> Trie:
        last = np.cumsum(self._lengths) - 1
        is_end = np.isin(self._tokens, sorted(ends))
        early = is_end.copy()
        early[last] = False
        if early.any():
            place = int(early.argmax())
            raise ValueError(
                f"item {self._item_at(place)} of the trie goes on behind token id {self._tokens[place]}, which ends an "
                "output: take it out of the item, or set ignore_eos=True or other stop_token_ids"
            )
        is_kept = self._lengths - is_end[last] >= min_tokens
        if not is_kept.any():
            raise ValueError(f"no item of the trie has min_tokens={min_tokens} tokens: the longest has {self.longest}")
        goes_on = self._are_beginnings()
        if goes_on.any() and not ends:
            raise ValueError(
                f"item {int(goes_on.argmax())} of the trie is the beginning of another, and nothing could end "
                "it there: give stop_token_ids, or leave out ignore_eos=True"
            )
        if not goes_on.any() and is_kept.all():
            return self
        return Trie(*_with_endings(self._tokens, self._lengths, is_kept, goes_on, sorted(ends)))

    def _are_beginnings(self) -> np.ndarray:
        """bool[I]: which items are the beginning of another."""
        ends = np.flatnonzero(self.items >= 0)
        found = np.zeros(len(self._lengths), bool)
        found[self.items[ends[~self.is_leaf(ends)]]] = True
        return found

    def _item_at(self, place: int) -> int:
        return int(np.searchsorted(np.cumsum(self._lengths), place, "right"))


def _levels(tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys of all edges, and the node at which each item ends."""
    starts = np.cumsum(lengths) - lengths
    nodes, num_nodes = np.zeros(len(lengths), np.int64), 1
    going, keys = np.arange(len(lengths)), []
    for depth in range(int(lengths.max())):
        going = going[lengths[going] > depth]
        level, places = np.unique((nodes[going] << 32) + tokens[starts[going] + depth], return_inverse=True)
        nodes[going] = num_nodes + places
        num_nodes += len(level)
        keys.append(level)
    if num_nodes > MAX_TOKEN:
        raise ValueError(f"the trie would have {num_nodes} nodes, and {MAX_TOKEN} are possible")
    return np.concatenate(keys), nodes


def _with_endings(
    tokens: np.ndarray, lengths: np.ndarray, is_kept: np.ndarray, goes_on: np.ndarray, ends: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The items that are kept, those that go on once for each end, which comes behind them."""
    starts = np.cumsum(lengths) - lengths
    plain, open_ = np.flatnonzero(is_kept & ~goes_on), np.flatnonzero(is_kept & goes_on)
    chosen = np.concatenate([plain, np.tile(open_, len(ends))])
    added = np.concatenate([np.full(len(plain), -1), np.repeat(np.array(ends, np.int64), len(open_))])
    new_lengths = lengths[chosen] + (added >= 0)
    new_starts = np.cumsum(new_lengths) - new_lengths
    made = np.empty(new_lengths.sum(), tokens.dtype)
    item = np.repeat(np.arange(len(chosen)), lengths[chosen])
    within = np.arange(len(item)) - np.repeat(np.cumsum(lengths[chosen]) - lengths[chosen], lengths[chosen])
    made[new_starts[item] + within] = tokens[starts[chosen][item] + within]
    made[(new_starts + new_lengths - 1)[added >= 0]] = added[added >= 0]
    return made, new_lengths


def _read(sequences: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all items end to end, i32, and how many each has, i64."""
    if isinstance(sequences, np.ndarray) and sequences.ndim == 2 and sequences.dtype.kind in "iu" and sequences.size:
        items, length = sequences.shape
        tokens, lengths = sequences.reshape(-1), np.full(items, length, np.int64)
    else:
        tokens, lengths = _read_lists(sequences)
    if ((tokens < 0) | (tokens > MAX_TOKEN)).any():
        place = int(((tokens < 0) | (tokens > MAX_TOKEN)).argmax())
        item = int(np.searchsorted(np.cumsum(lengths), place, "right"))
        raise ValueError(f"item {item} of the trie has {tokens[place]}, which is no token id")
    return tokens.astype(np.int32), lengths


def _read_lists(sequences: Any) -> tuple[np.ndarray, np.ndarray]:
    rows = unpacked(sequences) if not is_list(sequences) else sequences
    if not is_list(rows):
        raise ValueError(f"a trie is made of a list of lists of token ids, got {shortened(sequences)}")
    if not len(rows):
        raise ValueError("the trie has no items: no token could be chosen")
    rows = [unpacked(row) for row in rows]
    for number, row in enumerate(rows):
        if not is_list(row) or not len(row):
            raise ValueError(f"item {number} of the trie must be a list of at least one token id, got {shortened(row)}")
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    flat = list(itertools.chain.from_iterable(rows))
    if set(map(type, flat)) != {int}:
        flat = [_token(value, number) for number, row in enumerate(rows) for value in row]
    try:
        return np.array(flat, np.int64), lengths
    except OverflowError:
        place = next(i for i, value in enumerate(flat) if not -(2**63) <= value < 2**63)
        item = int(np.searchsorted(np.cumsum(lengths), place, "right"))
        raise ValueError(f"item {item} of the trie has {shortened(flat[place])}, which is no token id") from None


def _token(value: Any, number: int) -> int:
    token = as_int(value)
    if token is None:
        raise ValueError(f"item {number} of the trie has {shortened(value)}, which is no token id")
    return token
