"""What a tree of sequences is while a search works on it: nodes, their tokens and their block tables.

The tree owns every page of one allocator. All that can be refused is refused before anything changes; `grow`, which
takes pages, is all-or-nothing for all its nodes and can be undone until its steps have run. How full a page is belongs
to the node (its length), so `truncate` copies nothing and the next `grow` copies what is still shared.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jaxpaged.api.values import shortened
from jaxpaged.host.pages.block_table import (
    BlockTable,
    PageCopy,
    append_slots,
    fork,
    num_pages_for,
    num_pages_needed,
    release,
    truncate,
)
from jaxpaged.host.pages.page_allocator import OutOfPagesError, PageAllocator
from jaxpaged.host.sequence import Sequence
from jaxpaged.tree.batching import likeliest


class NextRow(NamedTuple):
    """Log-probabilities of the token behind a node, as they came with its last step."""

    logprobs: np.ndarray  # f32[V], or f32[k] best first
    token_ids: np.ndarray | None  # i32[k]; None: entry v is token v

    def find(self, token_id: int) -> tuple[float, int] | None:
        """Log-probability and rank of a token; None where it is not among the k."""
        if self.token_ids is None:
            logprob = self.logprobs[token_id]
            return float(logprob), 1 + int(np.count_nonzero(self.logprobs > logprob))
        found = np.flatnonzero(self.token_ids == token_id)
        return (float(self.logprobs[found[0]]), 1 + int(found[0])) if len(found) else None

    def suffices(self, top: int | None) -> bool:
        return self.token_ids is None or (top is not None and top <= len(self.token_ids))

    def cut(self, top: int | None) -> NextRow:
        """The `top` likeliest, or all for None; it must suffice."""
        if top is None:
            return self
        if self.token_ids is not None:
            return NextRow(self.logprobs[:top], self.token_ids[:top])
        values, ids = likeliest(self.logprobs[None], top)
        return NextRow(values[0], ids[0])


class Node:
    """One sequence of a tree: an opaque handle, made by `open` and `fork`, with its tokens to look at."""

    __slots__ = ("_is_free", "_is_pinned", "_next", "_number", "_sequence", "_state")

    def __init__(self, state: TreeState, number: int, sequence: Sequence):
        self._state = state
        self._number = number
        self._sequence = sequence
        self._is_pinned = False
        self._is_free = False
        self._next: NextRow | None = None

    @property
    def tokens(self) -> list[int]:
        """All its tokens, the prompt's first; a copy. They stay readable when the node is freed."""
        return self._sequence.token_ids[:]

    @property
    def length(self) -> int:
        return len(self._sequence.token_ids)

    @property
    def is_pinned(self) -> bool:
        return self._is_pinned

    @property
    def is_free(self) -> bool:
        return self._is_free

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        marks = ", pinned" * self._is_pinned + ", freed" * self._is_free
        return f"<Node {self._number}: {self.length} tokens{marks}>"


@dataclass(frozen=True, slots=True)
class TreeStats:
    """What a tree holds now, in pages of `page_size` tokens, and what it has cost so far."""

    nodes: int  # sequences that are not freed
    tokens: int  # token positions of all of them, shared ones counted for each
    page_size: int
    logical: int  # entries of all block tables: pages without sharing
    physical: int  # pages in use
    shared: int  # logical - physical: pages that sharing saves
    free: int
    peak: int  # most pages that were ever in use
    copies: int  # pages copied on write, ever
    computed_tokens: int  # token positions computed, ever


@dataclass(slots=True)
class Growth:
    """Nodes that `grow` made room for, and what it takes to undo that."""

    nodes: SequenceOf[Node]
    lengths: list[int]  # tokens before
    last_pages: list[int | None]  # the last page before
    copies: list[PageCopy]  # to be carried out before any of the new positions is written
    are_copied: bool = False


@dataclass(slots=True)
class TreeState:
    """The nodes of one tree, over all pages of `allocator`."""

    allocator: PageAllocator
    vocab_size: int
    max_len: int  # tokens of a node at most
    nodes: dict[Node, None] = field(default_factory=dict)  # in order of their making
    num_copied: int = 0
    num_computed: int = 0
    peak: int = 0
    _next_number: int = 0

    # Checks

    def check_nodes(self, what: str, nodes: SequenceOf[Any], changes: bool = False) -> None:
        """ValueError unless all are live nodes of this tree and, where `what` changes them, distinct and not pinned."""
        for node in nodes:
            if not isinstance(node, Node):
                raise ValueError(f"{what} takes nodes of a tree, got {shortened(node)}")
            if node._state is not self:
                raise ValueError(f"{what}: {node} belongs to another tree")
            if node._is_free:
                raise ValueError(f"{what}: {node} has no pages any more")
            if changes and node._is_pinned:
                raise ValueError(f"{what}: {node} is pinned, which makes it read-only: fork it, and use the fork")
        if changes and len(set(nodes)) < len(nodes):
            twice = next(node for node, count in Counter(nodes).items() if count > 1)
            raise ValueError(f"{what}: {twice} is given {nodes.count(twice)} times: fork it first, one fork a time")

    def check_tokens(self, what: str, tokens: SequenceOf[int]) -> None:
        for token_id in tokens:
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(
                    f"{what}: token id {shortened(token_id)} is outside the vocabulary, which has ids 0 to "
                    f"{self.vocab_size - 1}"
                )

    def check_length(self, what: str, length: int, count: int) -> None:
        if length + count > self.max_len:
            raise ValueError(
                f"{what}: {count} tokens behind {length} make {length + count}, max_model_len is {self.max_len}"
            )

    # What nodes can do

    def create(self, count: int) -> list[Node]:
        """Empty nodes, which become part of the tree when `grow` has given them their first tokens."""
        numbers = range(self._next_number, self._next_number + count)
        self._next_number += count
        return [Node(self, number, Sequence(0, [], 0)) for number in numbers]

    def fork(self, node: Node) -> Node:
        """A second node with the same tokens and pages. Takes no page, copies nothing, cannot fail."""
        (child,) = self.create(1)
        child._sequence.token_ids = node.tokens
        child._sequence.page_hashes = node._sequence.page_hashes[:]
        child._sequence.table = fork(node._sequence.table, self.allocator)
        child._next = node._next
        self.nodes[child] = None
        return child

    def grow(self, what: str, nodes: SequenceOf[Node], tokens: SequenceOf[list[int]], unwritten: int = 0) -> Growth:
        """Append tokens[i], and room for all but the `unwritten` last of them, to nodes[i]; all of them or none.

        Nodes that were just created may have pages already, which they have found.

        Raises OutOfPagesError, with the numbers and nothing changed, where the free pages do not suffice.
        """
        tables = [node._sequence.table for node in nodes]
        counts = [
            node.length + len(new) - unwritten - table.num_slots
            for node, table, new in zip(nodes, tables, tokens, strict=True)
        ]
        self._check_pages(what, tables, counts)
        growth = Growth(nodes, [n.length for n in nodes], [t.pages[-1] if t.pages else None for t in tables], [])
        growth.copies = append_slots(tables, counts, self.allocator)
        for node, new in zip(nodes, tokens, strict=True):
            node._sequence.token_ids += new
            self.nodes[node] = None
        self.num_copied += len(growth.copies)
        self.peak = max(self.peak, self.allocator.num_used)
        return growth

    def _check_pages(self, what: str, tables: list[BlockTable], counts: list[int]) -> None:
        needed, free = num_pages_needed(tables, counts, self.allocator), self.allocator.num_free
        if needed <= free:
            return
        size = self.allocator.page_size
        new = sum(num_pages_for(t.num_slots + n, size) - len(t.pages) for t, n in zip(tables, counts, strict=True))
        copied = f" and {needed - new} for copies of shared ones" if needed > new else ""
        raise OutOfPagesError(
            f"{what}: {sum(counts)} tokens on {len(tables)} nodes need {new} new pages of {size} tokens{copied}, and "
            f"{free} of {self.allocator.num_pages - 1} pages are free; nothing was changed: "
            "free nodes that are done with, or make the pool larger (num_pages)"
        )

    def undo(self, growth: Growth) -> None:
        """Take a growth back whose steps did not all run.

        Once the copies are made, nodes keep them: steps that did run may have written to what was copied.
        """
        for node, length, last_page in zip(growth.nodes, growth.lengths, growth.last_pages, strict=True):
            table = node._sequence.table
            truncate(table, length, self.allocator)
            self._cut_tokens(node, length)
            if not growth.are_copied and table.pages and last_page is not None and table.pages[-1] != last_page:
                self.allocator.release(table.pages[-1])
                self.allocator.share(last_page)
                table.pages[-1] = last_page
            if length == 0:
                del self.nodes[node]
        if not growth.are_copied:
            self.num_copied -= len(growth.copies)

    def find(self, nodes: SequenceOf[Node], tokens: SequenceOf[list[int]]) -> list[int]:
        """Give empty nodes the known pages of the tokens that they are to have, all but the last, which is computed.

        Returns how many tokens these hold; 0 for all where the nodes do not fit the pool.
        """
        known, size = self.allocator.known, self.allocator.page_size
        for node, ids in zip(nodes, tokens, strict=True):
            found = known.find(array("i", ids), node._sequence.page_hashes, (len(ids) - 1) // size)
            self.allocator.share_found(found)
            node._sequence.table = BlockTable(array("i", found), len(found) * size)
        tables = [node._sequence.table for node in nodes]
        counts = [len(ids) - table.num_slots for ids, table in zip(tokens, tables, strict=True)]
        if num_pages_needed(tables, counts, self.allocator) > self.allocator.num_free:
            for table in tables:
                release(table, self.allocator)
        return [table.num_slots for table in tables]

    def note_computed(self, nodes: SequenceOf[Node], lengths: SequenceOf[int]) -> None:
        """All positions of these nodes from `lengths[i]` on have been computed."""
        size = self.allocator.page_size
        for node, length in zip(nodes, lengths, strict=True):
            start, stop = length // size, node.length // size
            if start < stop:
                sequence = node._sequence
                ids = array("i", sequence.token_ids[: stop * size])
                self.allocator.known.add(sequence.table.pages, ids, sequence.page_hashes, start, stop)

    def truncate(self, node: Node, length: int) -> None:
        """Forget the tokens from `length` on. Copies nothing."""
        truncate(node._sequence.table, length, self.allocator)
        if length < node.length:
            self._cut_tokens(node, length)
            node._next = None

    def _cut_tokens(self, node: Node, length: int) -> None:
        del node._sequence.token_ids[length:]
        del node._sequence.page_hashes[length // self.allocator.page_size :]

    def free(self, node: Node) -> None:
        release(node._sequence.table, self.allocator)
        node._is_free, node._next = True, None
        del self.nodes[node]

    def stats(self) -> TreeStats:
        logical = sum(len(node._sequence.table.pages) for node in self.nodes)
        used = self.allocator.num_used
        return TreeStats(
            nodes=len(self.nodes), tokens=sum(node.length for node in self.nodes), page_size=self.allocator.page_size,
            logical=logical, physical=used, shared=logical - used, free=self.allocator.num_free, peak=self.peak,
            copies=self.num_copied, computed_tokens=self.num_computed,
        )  # fmt: skip

    def check_invariants(self) -> None:
        """Tables cover their nodes' tokens, counts equal table entries, and free and held pages partition the pool."""
        self.allocator.check_invariants()
        held: Counter[int] = Counter()
        for node in self.nodes:
            table = node._sequence.table
            assert table.num_slots == node.length > 0, f"{node} has slots for {table.num_slots} tokens"
            assert len(table.pages) == num_pages_for(node.length, self.allocator.page_size), f"{node}: {table}"
            held.update(table.pages)
            if node.length % self.allocator.page_size:
                assert table.pages[-1] not in self.allocator.known.hashes, f"{node}: page {table.pages[-1]} is not full"
        for page_id in range(1, self.allocator.num_pages):
            assert self.allocator.ref_count(page_id) == held[page_id], f"page {page_id} is held {held[page_id]} times"
