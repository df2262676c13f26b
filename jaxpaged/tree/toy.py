"""A language model without a network: any function from the tokens so far to logits, to write and debug a search on.

    def logits(prefix):                      # list of token ids -> one number for each token of the vocabulary
        return np.log([0.5, 0.25, 0.25])

    with ToyLM(logits, vocab_size=3).tree() as tree:
        ...                                  # as with llm.tree(): the same class, errors and page counts

What a search does to pages is real: the allocator and block tables are those of the engine, and a page holds token ids
in place of their keys and values. The function is given what is read back through a node's block table, so a mistake
there would be a wrong answer here too. Needs no jax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np

from jaxpaged.config import CacheConfig
from jaxpaged.host.pages.block_table import PageCopy
from jaxpaged.host.pages.page_allocator import PageAllocator
from jaxpaged.host.sequence import Sequence
from jaxpaged.text.tokenizer import Tokenizer
from jaxpaged.tree.batching import Span, SpanOutputs, likeliest
from jaxpaged.tree.tree import Tree

LogitsFunction = Callable[[list[int]], Any]


class ToyLM:
    """Stands in for an `LLM` wherever a search needs only its `tree()`."""

    def __init__(
        self,
        logits_fn: LogitsFunction,
        vocab_size: int,
        *,
        eos_token_ids: Iterable[int] = (),
        tokenizer: Tokenizer | None = None,
        max_model_len: int = 1024,
        page_size: int = 4,
        num_pages: int = 1024,
    ):
        """
        Args:
            logits_fn: token ids so far -> logits, `vocab_size` numbers; -inf for what is impossible. They need not be
                normalised. It is called once for each position whose log-probabilities are wanted.
            vocab_size: token ids are 0 to vocab_size - 1.
            eos_token_ids: with which a text ends, for searches that ask.
            tokenizer: an object with `encode` and `decode`, for searches on text.
            max_model_len, page_size, num_pages: as of an `LLM`; page 0 is never used.
        """
        for name, value in (("vocab_size", vocab_size), ("max_model_len", max_model_len)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        self.cache = CacheConfig(page_size, num_pages, "float32")
        self.logits_fn = logits_fn
        self.vocab_size = vocab_size
        self.eos_token_ids = frozenset(eos_token_ids)
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        if wrong := [i for i in self.eos_token_ids if not 0 <= i < vocab_size]:
            raise ValueError(f"eos_token_ids {wrong} are outside the vocabulary of {vocab_size}")

    def tree(self) -> Tree:
        """A tree over a pool of its own; any number may be open."""
        return Tree(ToySteps(self), self.tokenizer)


class ToySteps:
    """The `TreeModel` of a `ToyLM`."""

    is_lost = False

    def __init__(self, toy: ToyLM):
        self.allocator = PageAllocator(toy.cache.num_pages, toy.cache.page_size)
        self.vocab_size = toy.vocab_size
        self.max_len = toy.max_model_len
        self.eos_token_ids = toy.eos_token_ids
        self._logits_fn = toy.logits_fn
        self._pool = np.full((toy.cache.num_pages, toy.cache.page_size), -1, np.int64)  # token ids

    def copy_pages(self, copies: SequenceOf[PageCopy]) -> None:
        for src, dst in copies:
            self._pool[dst] = self._pool[src]

    def run(self, spans: SequenceOf[Span], top: int | None, wants_targets: bool) -> SpanOutputs:
        size = self.allocator.page_size
        for sequence, _, stop, write_from in spans:
            for position in range(write_from, stop):
                page = sequence.table.pages[position // size]
                self._pool[page, position % size] = sequence.token_ids[position]
        last = np.empty((len(spans), self.vocab_size), np.float32)
        logprobs: list[np.ndarray] = []
        ranks: list[np.ndarray] = []
        for i, span in enumerate(spans):
            targets = span.targets if wants_targets else []
            rows = [self._logprobs(span.sequence, span.start + j + 1) for j in range(len(targets))]
            chosen = np.array([row[token] for row, token in zip(rows, targets, strict=True)], np.float32)
            logprobs.append(chosen)
            ranks.append(np.array([1 + np.sum(row > p) for row, p in zip(rows, chosen, strict=True)], np.int32))
            if top != 0:
                last[i] = self._logprobs(span.sequence, span.stop)
        if top is None:
            return SpanOutputs(last, None, logprobs, ranks)
        values, ids = likeliest(last, top) if top else (last[:, :0], np.empty((len(spans), 0), np.int32))
        return SpanOutputs(values, ids, logprobs, ranks)

    def warm_up(self, top: int | None) -> None:
        """Nothing is compiled."""

    def close(self) -> None:
        """Nothing is shared with anyone."""

    def _logprobs(self, sequence: Sequence, length: int) -> np.ndarray:
        """f32[V]: of the token behind the first `length` of a sequence, which are read from its pages."""
        size = self.allocator.page_size
        pages = sequence.table.pages
        prefix = [int(self._pool[pages[p // size], p % size]) for p in range(length)]
        assert min(prefix) >= 0, f"a position of {prefix} was never written"
        logits = np.asarray(self._logits_fn(prefix), np.float64)
        if logits.shape != (self.vocab_size,):
            raise ValueError(
                f"logits_fn({prefix}) has shape {logits.shape}; needed is a logit for each of {self.vocab_size} tokens"
            )
        highest = logits.max()
        if not np.isfinite(highest) or np.isnan(logits).any():
            raise ValueError(f"logits_fn({prefix}) has NaN or +inf, or nothing that is possible")
        shifted = logits - highest
        return (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)
