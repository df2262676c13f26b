"""Sequence primitives for searches of your own: open, fork, append, truncate, free, pin and score, on shared pages.

    with llm.tree() as tree:
        root = tree.open("def f(")             # computed once
        kids = tree.fork(root, 8)              # tables and counts only
        out = tree.append(kids, tokens)        # one step for all eight

Calls are synchronous and batched: any number of nodes, cut into as few steps as the engine's limits allow. A call that
raises has changed nothing. `ToyLM` (toy.py) has the same `tree()` over a function of your own instead of a network.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from jaxpaged.api.values import as_int, check_encodable, shortened
from jaxpaged.host.ownership import Ownership
from jaxpaged.host.pages.page_allocator import OutOfPagesError
from jaxpaged.requests.prompts import PromptEncoder, is_one_prompt, read_prompts
from jaxpaged.text.stream import decode_continuation
from jaxpaged.text.tokenizer import Tokenizer, encode_continuation, need_tokenizer
from jaxpaged.tree.compute import TreeComputer, TreeModel
from jaxpaged.tree.input import read_continuations, read_ids, read_tokens
from jaxpaged.tree.outputs import Appended, NextTokens, Scores
from jaxpaged.tree.state import Node, TreeStats

__all__ = ["Appended", "NextTokens", "Node", "OutOfPagesError", "Scores", "Tree", "TreeStats"]

Nodes = Node | SequenceOf[Node]
NO_TOKENIZER = "this model has none"
#: Of one call; each is an object of its own.
MAX_FORKS = 1_000_000

P = ParamSpec("P")
R = TypeVar("R")


def one_call(method: Callable[Concatenate[Tree, P], R]) -> Callable[Concatenate[Tree, P], R]:
    """A method of an open tree, which no other call may be in: of two threads the second is refused."""

    @functools.wraps(method)
    def call(self: Tree, *args: P.args, **options: P.kwargs) -> R:
        with self._turn.held(method.__name__):
            self._check_open()
            return method(self, *args, **options)

    return call


class Tree:
    """Sequences that share their common pages, for as long as the `with` block lasts: it owns the whole page pool.

    Where a call takes `nodes`, it takes one or a list, and a list is computed together. Results have one row a node.
    `top` says which next-token log-probabilities come back: None the whole vocabulary, k the k likeliest.

    Raises ValueError for what can never work (freed or foreign nodes, a node twice in one append, pinned nodes that
    would change, tokens outside the vocabulary, lengths past the end), OutOfPagesError where pages do not suffice now,
    RuntimeError when the tree is closed or another call of it has not returned; always before anything is changed.
    """

    def __init__(self, model: TreeModel, tokenizer: Tokenizer | None = None):
        self.tokenizer = tokenizer
        self._encoder = PromptEncoder(tokenizer, NO_TOKENIZER)
        self._model = model
        self._computer = TreeComputer(model)
        self._state = self._computer.state
        self._turn = Ownership(_turn_refusal)
        self._close_model = weakref.finalize(self, model.close)  # also when a tree is dropped without `close`

    def __enter__(self) -> Tree:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if not self._close_model.alive:
            return "<Tree, closed>"
        stats = self._state.stats()
        return f"<Tree: {stats.nodes} nodes on {stats.physical} of {stats.physical + stats.free} pages>"

    def close(self) -> None:
        """Free all nodes and give the pool back; closing twice does nothing."""
        with self._turn.held("close"):
            if self._close_model.alive:
                for node in list(self._state.nodes):
                    self._state.free(node)
                self._close_model()

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    @property
    def max_len(self) -> int:
        """Tokens that a node can have at most."""
        return self._model.max_len

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids with which the model ends a text."""
        return self._model.eos_token_ids

    @property
    def nodes(self) -> list[Node]:
        """All nodes that are not freed, in the order of their making."""
        return list(self._state.nodes)

    # Making nodes and parting with them

    @one_call
    def open(self, prompts: Any, top: int | None = None) -> Any:
        """Compute a prompt: a node; or a list of prompts, together: a list of nodes.

        A prompt is text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}; with a text
        "add_special_tokens": False leaves out the tokenizer's special tokens. What comes next is kept with the node:
        `next_tokens`.
        """
        read = read_prompts(prompts)
        top = self._read_top(top)
        token_ids = [self._encoder.encode(prompt, prompt.add_special_tokens is not False) for prompt in read]
        for tokens in token_ids:
            self._state.check_tokens("open", tokens)
            self._state.check_length("open", 0, len(tokens))
        nodes = self._computer.open(token_ids, top)
        return nodes[0] if is_one_prompt(prompts) else nodes

    @one_call
    def fork(self, nodes: Nodes, n: int | None = None) -> Any:
        """Second nodes on the same pages; costs tables and counts, and never fails for want of pages.

        fork(node) -> a node; fork(node, n) -> n of them; fork(list) -> one of each, where a node may be listed often.
        """
        if isinstance(nodes, Node):
            self._state.check_nodes("fork", [nodes])
            if n is None:
                return self._state.fork(nodes)
            count = as_int(n)
            if count is None or not 0 <= count <= MAX_FORKS:
                most = "" if count is None or count < 0 else f" and at most {MAX_FORKS}"
                raise ValueError(f"fork: n must be an integer of at least 0{most}, got {shortened(n)}")
            return [self._state.fork(nodes) for _ in range(count)]
        if n is not None:
            raise ValueError("fork: give one node with n, or a list of nodes (each as often as wanted) without")
        nodes = _listed(nodes)
        self._state.check_nodes("fork", nodes)
        return [self._state.fork(node) for node in nodes]

    @one_call
    def reorder(self, nodes: SequenceOf[Node], parents: SequenceOf[int] | np.ndarray) -> list[Node]:
        """The step of beam and particle searches: go on with nodes[i] for each i of `parents`, and free the others.

        The first that names a parent gets the parent itself, every further one a fork, so that the next append copies
        no page more than it must. Pinned nodes stay, and are forked every time.
        """
        nodes, indices = _listed(nodes), read_ids("reorder", parents)
        self._state.check_nodes("reorder", nodes)
        if len(set(nodes)) < len(nodes):
            raise ValueError("reorder: a node is given twice: fork it first")
        if any(not 0 <= i < len(nodes) for i in indices):
            raise ValueError(f"reorder: parents {shortened(indices)} are not all in 0 to {len(nodes) - 1}")
        kept: set[Node] = {node for node in nodes if node.is_pinned}
        children = []
        for i in indices:
            children.append(self._state.fork(nodes[i]) if nodes[i] in kept else nodes[i])
            kept.add(nodes[i])
        for node in nodes:
            if node not in kept:
                self._state.free(node)
        return children

    @one_call
    def truncate(self, nodes: Nodes, length: int) -> None:
        """Go back to the first `length` tokens (at least 1). Copies nothing; the next append does, if it must."""
        listed = _listed(nodes)
        self._state.check_nodes("truncate", listed, changes=True)
        kept = as_int(length)
        for node in listed:
            if kept is None or not 1 <= kept <= node.length:
                raise ValueError(f"truncate: length {shortened(length)} of {node} is not in 1 to {node.length}")
        for node in listed:
            self._state.truncate(node, kept)  # type: ignore[arg-type]

    @one_call
    def free(self, nodes: Nodes) -> None:
        """Give up nodes, pinned ones too; their pages are free when no other node holds them."""
        listed = _listed(nodes)
        self._state.check_nodes("free", listed)
        if len(set(listed)) < len(listed):
            raise ValueError("free: a node is given twice")
        for node in listed:
            self._state.free(node)

    @one_call
    def pin(self, nodes: Nodes) -> None:
        """Make nodes read-only: they can be forked, scored and freed, and nothing else."""
        listed = _listed(nodes)
        self._state.check_nodes("pin", listed)
        for node in listed:
            node._is_pinned = True

    # Computing

    @one_call
    def append(self, nodes: Nodes, tokens: Any, top: int | None = None) -> Appended:
        """Append one or more tokens to each node: one id each, or a list of lists, which may differ in length.

        All or nothing, for the whole call: where the pages do not suffice, OutOfPagesError says how many are needed,
        and every node is as it was.
        """
        listed = _listed(nodes)
        self._state.check_nodes("append", listed, changes=True)
        new = read_tokens("append", tokens, len(listed), is_single=isinstance(nodes, Node))
        top = self._read_top(top)
        for node, row in zip(listed, new, strict=True):
            self._state.check_tokens("append", row)
            self._state.check_length("append", node.length, len(row))
        return Appended(*self._computer.append(listed, new, top))

    @one_call
    def next_tokens(self, nodes: Nodes, top: int | None = None) -> NextTokens:
        """The log-probabilities of what comes next, without appending: after a fork, a truncate, or much later.

        What the latest append to a node gave is kept with it and its forks; only where that does not suffice is the
        node's last token computed again.
        """
        listed = _listed(nodes)
        self._state.check_nodes("next_tokens", listed)
        top = self._read_top(top)
        rows = self._computer.next_rows(listed, top)
        width = self.vocab_size if top is None else top
        logprobs = np.empty((len(rows), width), np.float32)
        ids = None if top is None else np.empty((len(rows), width), np.int32)
        for i, row in enumerate(rows):
            logprobs[i] = row.logprobs
            if ids is not None:
                ids[i] = row.token_ids
        return NextTokens(logprobs, ids)

    @one_call
    def score(self, nodes: Nodes, continuations: Any) -> Scores:
        """How likely given continuations are: of one node a list of them, or of a list of nodes one each.

        The nodes stay as they are: pages are taken for a while, for as many continuations at a time as the free pages
        hold, and none at all for continuations of one token.
        """
        listed = _listed(nodes)
        self._state.check_nodes("score", listed)
        rows = read_continuations(continuations, len(listed), is_single=isinstance(nodes, Node))
        parents = listed * len(rows) if isinstance(nodes, Node) else listed
        for node, row in zip(parents, rows, strict=True):
            self._state.check_tokens("score", row)
            self._state.check_length("score", node.length, len(row) - 1)
        return Scores(*self._computer.score(parents, rows))

    @one_call
    def warm_up(self, top: int | None = None) -> None:
        """Compile everything that calls with this `top` can need; no later one compiles anything."""
        top = self._read_top(top)
        self._model.warm_up(top)

    # Looking

    def text(self, node: Node, tokens: SequenceOf[int] | None = None) -> str:
        """The text of a node, or the text that `tokens` add behind it."""
        self._state.check_nodes("text", [node])
        tokenizer = need_tokenizer(self.tokenizer, "text needs", NO_TOKENIZER)
        if tokens is None:
            return tokenizer.decode(node.tokens)
        ids = read_ids("text", tokens)
        self._state.check_tokens("text", ids)
        return decode_continuation(tokenizer, node.tokens, ids)

    def encode(self, node: Node, text: str) -> list[int]:
        """The token ids that add `text` behind a node, to be appended or scored; ValueError where there are none."""
        self._state.check_nodes("encode", [node])
        if not isinstance(text, str):
            raise ValueError(f"encode takes text, got {shortened(text)}")
        check_encodable(text, "encode: the text")
        tokenizer = need_tokenizer(self.tokenizer, "encode needs", NO_TOKENIZER)
        return encode_continuation(tokenizer, node.tokens, text)

    def stats(self) -> TreeStats:
        """Pages now (logical, physical, shared, free) and what was spent so far (peak, copies, computed tokens)."""
        return self._state.stats()

    def check_invariants(self) -> None:
        """AssertionError if page counts and block tables disagree, which would be a bug of jaxpaged; for tests."""
        self._state.check_invariants()

    # Within

    def _check_open(self) -> None:
        if not self._close_model.alive:
            raise RuntimeError("this tree is closed and its nodes are gone: open another with llm.tree()")
        if self._model.is_lost:
            raise RuntimeError(
                "a step was interrupted and took the page pool with it: the nodes of this tree are lost; "
                "close it and open another"
            )

    def _read_top(self, top: int | None) -> int | None:
        if top is None:
            return None
        number = as_int(top)
        if number is None or not 1 <= number <= self.vocab_size:
            raise ValueError(f"top must be None (all) or an integer from 1 to {self.vocab_size}, got {shortened(top)}")
        return number


def _listed(nodes: Nodes) -> list[Node]:
    if isinstance(nodes, Node):
        return [nodes]
    try:
        return list(nodes)
    except TypeError:
        raise ValueError(f"nodes of a tree are given as one or as a list, got {shortened(nodes)}") from None


def _turn_refusal(who: str) -> str:
    return f"another call of this tree has not returned ({who}): wait for it; a tree takes one call at a time"
