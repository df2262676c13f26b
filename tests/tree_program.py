"""Random programs of tree calls against an oracle that recomputes every sequence from its tokens alone."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxpaged.tree.tree import Node, OutOfPagesError, Tree

MAX_LEN = 32


class TreeProgram(RuleBasedStateMachine):
    """Subclasses say what computes the tree and what it must equal.

    A list of tokens a node plays the tree. After every call the nodes have these tokens, the pages are counted right,
    and what a call returned is what `logprobs_after` says of the tokens.
    """

    vocab_size: int
    tolerance: float

    def make_tree(self, seed: int) -> Tree:
        """A new tree; `seed` says in which order the pages of the pool are taken."""
        raise NotImplementedError

    def logprobs_after(self, tokens: list[int]) -> np.ndarray:
        """f32[V]: of the next token, recomputed from all the tokens."""
        raise NotImplementedError

    @initialize(seed=st.integers(0, 2**16))
    def start(self, seed):
        self.tree = self.make_tree(seed)
        self.expected: dict[Node, list[int]] = {}
        self.copies = 0

    def teardown(self):
        if hasattr(self, "tree"):
            self.tree.close()

    # What is drawn

    def draw_nodes(self, data, unpinned=False, unique=True) -> list[Node]:
        nodes = [node for node in self.expected if not (unpinned and node.is_pinned)]
        if not nodes:
            return []
        return data.draw(st.lists(st.sampled_from(nodes), unique=unique, min_size=1, max_size=5))

    def draw_tokens(self, data, most=6) -> list[int]:
        return data.draw(st.lists(st.integers(0, self.vocab_size - 1), min_size=1, max_size=most))

    def draw_top(self, data) -> int | None:
        return data.draw(st.sampled_from([None, None, 1, 3]))

    # What is checked

    def check_next(self, out, nodes, top):
        assert len(out) == len(nodes)
        for i, node in enumerate(nodes):
            truth = self.logprobs_after(self.expected[node])
            if top is None:
                assert out.token_ids is None
                np.testing.assert_allclose(out.logprobs[i], truth, atol=self.tolerance)
                continue
            assert len(set(out.token_ids[i].tolist())) == top
            np.testing.assert_allclose(out.logprobs[i], truth[out.token_ids[i]], atol=self.tolerance)
            np.testing.assert_allclose(out.logprobs[i], np.sort(truth)[::-1][:top], atol=self.tolerance)

    def check_tokens(self, before: list[int], new: list[int], logprobs, ranks):
        assert len(logprobs) == len(ranks) == len(new)
        for i, token in enumerate(new):
            truth = self.logprobs_after(before + new[:i])
            np.testing.assert_allclose(logprobs[i], truth[token], atol=self.tolerance)
            lowest, highest = (1 + int((truth > truth[token] + slack).sum()) for slack in (1, -1) * self.slack)
            assert lowest <= ranks[i] <= max(lowest, highest)

    @property
    def slack(self) -> np.ndarray:
        return np.array([self.tolerance])

    def unchanged(self, call):
        """The pages did not suffice: nothing may differ."""
        before = self.tree.stats()
        try:
            result = call()
        except OutOfPagesError as error:
            assert f"{before.free} of" in str(error)
            assert self.tree.stats() == before
            return None
        return result

    # The calls

    @rule(data=st.data(), count=st.integers(1, 3))
    def open(self, data, count):
        prompts = [self.draw_tokens(data, 9) for _ in range(count)]
        top = self.draw_top(data)
        nodes = self.unchanged(lambda: self.tree.open(prompts, top=top))
        if nodes is not None:
            self.expected.update(zip(nodes, map(list, prompts), strict=True))
            self.check_next(self.tree.next_tokens(nodes, top), nodes, top)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def fork(self, data):
        nodes = self.draw_nodes(data, unique=False)
        free = self.tree.stats().free
        children = self.tree.fork(nodes)
        assert self.tree.stats().free == free
        for node, child in zip(nodes, children, strict=True):
            assert not child.is_pinned
            self.expected[child] = list(self.expected[node])

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def append(self, data):
        nodes = [node for node in self.draw_nodes(data, unpinned=True) if node.length <= MAX_LEN - 6]
        if not nodes:
            return
        is_one_each = data.draw(st.booleans())
        new = [self.draw_tokens(data, 1 if is_one_each else 6) for _ in nodes]
        top = self.draw_top(data)
        out = self.unchanged(lambda: self.tree.append(nodes, [row[0] for row in new] if is_one_each else new, top=top))
        if out is None:
            return
        for i, (node, row) in enumerate(zip(nodes, new, strict=True)):
            self.check_tokens(self.expected[node], row, out.token_logprobs[i], out.token_ranks[i])
            self.expected[node] += row
        self.check_next(out, nodes, top)

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), is_copying=st.booleans())
    def interrupted_append(self, data, is_copying):
        """Control-C before the copies, or when some of the steps have run: every node must be as it was."""
        nodes = [node for node in self.draw_nodes(data, unpinned=True) if node.length <= MAX_LEN - 6]
        new = [self.draw_tokens(data) for _ in nodes]
        num_run = data.draw(st.integers(0, len(nodes)))
        model = self.tree._model
        run = model.run

        def interrupt(*_):
            raise KeyboardInterrupt

        def run_some(spans, top, wants_targets):
            run(spans[:num_run], top, wants_targets)
            raise KeyboardInterrupt

        copies = self.tree.stats().copies
        name = "copy_pages" if is_copying else "run"
        setattr(model, name, interrupt if is_copying else run_some)
        try:
            self.tree.append(nodes, new)
            raise AssertionError("it was not interrupted")
        except (KeyboardInterrupt, OutOfPagesError):
            pass
        finally:
            delattr(model, name)
        assert not is_copying or self.tree.stats().copies == copies

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def look_again(self, data):
        nodes, top = self.draw_nodes(data, unique=False), self.draw_top(data)
        self.check_next(self.tree.next_tokens(nodes, top), nodes, top)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def score(self, data):
        nodes = [node for node in self.draw_nodes(data, unique=False) if node.length <= MAX_LEN - 6]
        if not nodes:
            return
        is_of_one = data.draw(st.booleans())
        rows = [self.draw_tokens(data) for _ in nodes]
        scored = nodes[:1] * len(rows) if is_of_one else nodes
        copies = self.tree.stats().copies
        scores = self.unchanged(lambda: self.tree.score(nodes[0] if is_of_one else nodes, rows))
        if scores is not None:
            for i, (node, row) in enumerate(zip(scored, rows, strict=True)):
                self.check_tokens(self.expected[node], row, scores.token_logprobs[i], scores.token_ranks[i])
            assert self.tree.stats().copies >= copies

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def truncate(self, data):
        for node in self.draw_nodes(data, unpinned=True)[:2]:
            length = data.draw(st.integers(1, node.length))
            copies = self.tree.stats().copies
            self.tree.truncate(node, length)
            assert self.tree.stats().copies == copies
            del self.expected[node][length:]

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def free(self, data):
        nodes = self.draw_nodes(data)
        self.tree.free(nodes)
        for node in nodes:
            assert node.is_free
            del self.expected[node]

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def pin(self, data):
        self.tree.pin(self.draw_nodes(data)[:1])

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def reorder(self, data):
        nodes = self.draw_nodes(data)
        parents = data.draw(st.lists(st.integers(0, len(nodes) - 1), max_size=5))
        children = self.tree.reorder(nodes, parents)
        tokens = [list(self.expected[nodes[i]]) for i in parents]
        for i, node in enumerate(nodes):
            if i not in parents and not node.is_pinned:
                assert node.is_free
                del self.expected[node]
        assert len(set(children)) == len(children)
        self.expected.update(zip(children, tokens, strict=True))

    @invariant()
    def nodes_have_their_tokens_and_pages_are_counted_right(self):
        if not hasattr(self, "tree"):
            return
        assert {node: node.tokens for node in self.tree.nodes} == self.expected
        self.tree.check_invariants()
        stats = self.tree.stats()
        assert stats.logical == sum(-(-len(tokens) // stats.page_size) for tokens in self.expected.values())
        assert stats.logical - stats.shared == stats.physical <= stats.peak

    @invariant()
    def every_node_can_be_read_back(self):
        """The last token runs again over what the pages hold: a page that another node overwrote would show."""
        if getattr(self, "expected", None):
            for node in self.expected:
                node._next = None
            nodes = list(self.expected)
            self.check_next(self.tree.next_tokens(nodes, top=1), nodes, top=1)
