"""The computing half of a tree: which positions a call runs, in which order pages are taken, copied and written.

Pages are taken for a whole call at once, then copied where shared, then written; if that is interrupted (Control-C, a
device out of memory), the growth is undone. What is known of the token behind a node is kept with the node, so that
most calls need no position twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from jaxpaged.host.pages.block_table import PageCopy, num_pages_needed
from jaxpaged.host.pages.page_allocator import OutOfPagesError, PageAllocator
from jaxpaged.tree.batching import Span, SpanOutputs
from jaxpaged.tree.state import Growth, NextRow, Node, TreeState


class TreeModel(Protocol):
    """What computes a tree: the engine (on_engine.py) or a toy (toy.py)."""

    allocator: PageAllocator  # all of whose pages are free, and the tree's own until `close`
    vocab_size: int
    max_len: int
    eos_token_ids: frozenset[int]

    @property
    def is_lost(self) -> bool:
        """Whether an interrupted step has cost the contents of the pages."""
        ...

    def copy_pages(self, copies: SequenceOf[PageCopy]) -> None: ...

    def run(self, spans: SequenceOf[Span], top: int | None, wants_targets: bool) -> SpanOutputs:
        """Compute the spans; the `top` likeliest successors of each (0: none, None: all), and its targets if wanted."""
        ...

    def warm_up(self, top: int | None) -> None: ...

    def close(self) -> None: ...


class TreeComputer:
    """Runs calls whose arguments were checked; `what` is the call's name, for messages."""

    def __init__(self, model: TreeModel):
        self.model = model
        self.state = TreeState(model.allocator, model.vocab_size, model.max_len)

    def open(self, token_ids: SequenceOf[list[int]], top: int | None) -> list[Node]:
        """A node for each list of ids, computed together."""
        nodes = self.state.create(len(token_ids))
        starts = self.state.find(nodes, token_ids)
        with self._growing("open", nodes, token_ids):
            spans = [Span(node._sequence, start, node.length, start) for node, start in zip(nodes, starts, strict=True)]
            self._remember(nodes, self._run(spans, top, wants_targets=False))
        self.state.note_computed(nodes, starts)
        return nodes

    def append(self, nodes: SequenceOf[Node], tokens: SequenceOf[list[int]], top: int | None) -> SpanOutputs:
        """Append tokens[i] to nodes[i]; the targets of the result are all of them."""
        # Of the first token the step before has spoken; where nobody kept what it said, its last position runs again.
        first = [node._next.find(row[0]) if node._next else None for node, row in zip(nodes, tokens, strict=True)]
        starts = [node.length - (known is None) for node, known in zip(nodes, first, strict=True)]
        with self._growing("append", nodes, tokens) as growth:
            spans = [
                Span(node._sequence, start, node.length, length)
                for node, start, length in zip(nodes, starts, growth.lengths, strict=True)
            ]
            outputs = self._run(spans, top, wants_targets=True)
            self._remember(nodes, outputs)
        self.state.note_computed(nodes, growth.lengths)
        logprobs, ranks = outputs.target_logprobs, outputs.target_ranks
        for i, known in enumerate(first):
            if known is not None:
                logprobs[i] = np.concatenate([np.array(known[:1], np.float32), logprobs[i]])
                ranks[i] = np.concatenate([np.array(known[1:], np.int32), ranks[i]])
        return outputs

    def next_rows(self, nodes: SequenceOf[Node], top: int | None) -> list[NextRow]:
        """What comes next behind each node; computed again only where what is kept does not suffice."""
        stale = [node for node in dict.fromkeys(nodes) if node._next is None or not node._next.suffices(top)]
        if stale:
            spans = [Span(node._sequence, node.length - 1, node.length, node.length) for node in stale]
            self._remember(stale, self._run(spans, top, wants_targets=False))
        return [node._next.cut(top) for node in nodes if node._next is not None]

    def score(self, parents: list[Node], rows: list[list[int]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Log-probabilities and ranks of the tokens of rows[i] behind parents[i], which stay as they are."""
        for node, row in zip(parents, rows, strict=True):
            self._check_fits(node, row)
        logprobs: list[np.ndarray] = []
        ranks: list[np.ndarray] = []
        while len(logprobs) < len(rows):
            outputs = self._score_some(parents[len(logprobs) :], rows[len(logprobs) :])
            logprobs += outputs.target_logprobs
            ranks += outputs.target_ranks
        return logprobs, ranks

    @contextmanager
    def _growing(
        self, what: str, nodes: SequenceOf[Node], tokens: SequenceOf[list[int]], unwritten: int = 0
    ) -> Iterator[Growth]:
        """Make room, copy what is shared, compute; undone if that is interrupted."""
        growth = self.state.grow(what, nodes, tokens, unwritten)
        try:
            self.model.copy_pages(growth.copies)
            growth.are_copied = True
            yield growth
        except BaseException:
            self.state.undo(growth)
            raise

    def _run(self, spans: list[Span], top: int | None, wants_targets: bool) -> SpanOutputs:
        outputs = self.model.run(spans, top, wants_targets)
        self.state.num_computed += sum(span.stop - span.start for span in spans)
        return outputs

    def _remember(self, nodes: SequenceOf[Node], outputs: SpanOutputs) -> None:
        outputs.next_logprobs.setflags(write=False)  # the caller gets the same array
        for i, node in enumerate(nodes):
            node._next = NextRow(outputs.next_logprobs[i], None if outputs.next_ids is None else outputs.next_ids[i])

    def _score_some(self, parents: list[Node], rows: list[list[int]]) -> SpanOutputs:
        """Score the first continuations, as many as the free pages hold (at least one, which was checked)."""
        forks: list[Node] = []
        try:
            needed = 0
            for parent, row in zip(parents, rows, strict=True):
                needed += self._pages_to_score(parent, row)
                if forks and needed > self.state.allocator.num_free:
                    break
                forks.append(self.state.fork(parent))
            with self._growing("score", forks, rows[: len(forks)], unwritten=1) as growth:
                spans = [
                    Span(fork._sequence, length - 1, fork.length - 1, length)
                    for fork, length in zip(forks, growth.lengths, strict=True)
                ]
                return self._run(spans, 0, wants_targets=True)
        finally:
            for fork in forks:
                self.state.free(fork)

    def _pages_to_score(self, node: Node, row: list[int]) -> int:
        """Pages that a fork of `node` takes to hold all of `row` but its last token, beside the node itself."""
        table, size = node._sequence.table, self.state.allocator.page_size
        new = num_pages_needed([table], [len(row) - 1], self.state.allocator)
        is_copied = len(row) > 1 and table.num_slots % size and self.state.allocator.ref_count(table.pages[-1]) == 1
        return new + bool(is_copied)

    def _check_fits(self, node: Node, row: list[int]) -> None:
        needed, free = self._pages_to_score(node, row), self.state.allocator.num_free
        if needed > free:
            raise OutOfPagesError(
                f"score: a continuation of {len(row)} tokens behind {node.length} needs {needed} pages of "
                f"{self.state.allocator.page_size} tokens, and {free} of {self.state.allocator.num_pages - 1} are "
                "free: free nodes that are done with, or make the pool larger (num_pages)"
            )
