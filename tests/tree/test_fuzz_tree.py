"""Whatever a tree, its results and the searches are given: they do it or refuse it, and the books are right."""

from __future__ import annotations

import numpy as np
import pytest
from hostile import anything, cases, edge_floats, edge_ints, id_lists, numbers, run_cases
from hypothesis import strategies as st
from toy import char_tokenizer

from jaxpaged.tree.search import best_of_n, monte_carlo_tree_search, rollout, step_beam_search, stochastic_beam_search
from jaxpaged.tree.toy import ToyLM
from jaxpaged.tree.tree import OutOfPagesError

VOCAB = 97


class Characters:
    """What a tree needs of a tokenizer."""

    def __init__(self):
        self._model = char_tokenizer()

    def encode(self, text, add_special_tokens=True):
        return self._model.encode(text).ids

    def decode(self, token_ids, skip_special_tokens=True):
        return self._model.decode(token_ids)


def logits(prefix):
    return np.sin(np.arange(VOCAB) * (1 + sum(prefix) % 7))


def toy_tree():
    return ToyLM(
        logits, VOCAB, eos_token_ids=[1], tokenizer=Characters(), max_model_len=24, page_size=2, num_pages=40
    ).tree()


indices = st.lists(st.integers(0, 3), max_size=3)
#: Which node or nodes, by place among those there are; or something that is none.
nodes = st.one_of(st.integers(0, 3), indices, st.builds(lambda odd: (odd,), anything))
tops = st.none() | st.integers(-1, 120) | edge_ints | anything
tokens = st.integers(0, 96) | id_lists | st.lists(id_lists, max_size=3) | anything
counts = st.integers(0, 4) | edge_ints | anything
CALLS = {
    "open": st.tuples(st.text("abc", min_size=1, max_size=4) | tokens, tops),
    "fork": st.tuples(nodes, st.none() | counts.filter(lambda n: not isinstance(n, int) or n < 10 or n > 10**7)),
    "reorder": st.tuples(nodes, indices | anything),
    "truncate": st.tuples(nodes, counts),
    "free": st.tuples(nodes),
    "pin": st.tuples(nodes),
    "append": st.tuples(nodes, tokens, tops),
    "next_tokens": st.tuples(nodes, tops),
    "score": st.tuples(nodes, tokens),
    "text": st.tuples(nodes, st.none() | tokens),
    "encode": st.tuples(nodes, st.text("ab", max_size=3) | anything),
    "warm_up": st.tuples(tops),
}
calls = st.sampled_from(sorted(CALLS)).flatmap(lambda name: st.tuples(st.just(name), CALLS[name]))


def resolved(argument, tree):
    live = tree.nodes
    if isinstance(argument, tuple):
        return argument[0]
    if isinstance(argument, int):
        return live[argument % len(live)]
    return [live[i % len(live)] for i in argument]


@cases(quick=200)
def test_any_calls_of_a_tree_keep_its_books(num_cases):
    def check(sequence):
        with toy_tree() as tree:
            root = tree.open([5, 6, 7])
            tree.pin(root)
            for name, arguments in sequence:
                if name not in ("open", "warm_up"):
                    arguments = (resolved(arguments[0], tree) if tree.nodes else root, *arguments[1:])
                lengths = {node: node.length for node in tree.nodes}
                try:
                    getattr(tree, name)(*arguments)
                except (ValueError, OutOfPagesError) as error:
                    assert str(error)
                    assert {node: node.length for node in tree.nodes} == lengths  # nothing was changed
                tree.check_invariants()

    run_cases(num_cases, check, st.lists(calls, min_size=1, max_size=6))


@cases(quick=150)
def test_results_of_a_tree_read_any_argument(num_cases):
    with toy_tree() as tree:
        root = tree.open([5, 6])
        kids = tree.fork(root, 3)
        whole, few = tree.next_tokens(kids), tree.next_tokens(kids, top=4)

    def check(argument, temperature, top_p, is_whole):
        out = whole if is_whole else few
        for call in (out.top, out.of, out.rows):
            try:
                call(argument)
            except ValueError as error:
                assert str(error)
        try:
            ids, logprobs = out.sample(argument, temperature, top_p)
        except ValueError as error:
            assert str(error)
            return
        assert len(ids) == 3 and all(0 <= i < VOCAB for i in ids) and np.isfinite(logprobs).all()

    shares = st.floats(0, 2) | edge_floats | anything
    run_cases(
        num_cases, check, st.integers(0, 9) | st.lists(st.integers(0, 96)) | anything, shares, shares, st.booleans()
    )


def test_the_smallest_share_and_temperature_are_the_likeliest_token():
    with toy_tree() as tree:
        out = tree.next_tokens([tree.open([5, 6])])
        likeliest = out.sample(0, temperature=0)[0]
        for narrow in (dict(top_p=5e-324), dict(top_p=1e-38), dict(temperature=1e-320), dict(temperature=1e-38)):
            assert out.sample(3, **narrow)[0] == likeliest


SEARCHES = {
    "rollout": (lambda tree, root, **given: rollout(tree, [tree.fork(root)], **given), dict(max_tokens=2, seed=0)),
    "best_of_n": (best_of_n, dict(n=2, max_tokens=2, seed=0)),
    "mcts": (
        lambda tree, root, **given: monte_carlo_tree_search(tree, root, lambda tokens: len(tokens) / 9, **given),
        dict(num_simulations=3, max_tokens=2, seed=0, num_children=2, exploration=1.0, root_noise=0.0, num_parallel=1),
    ),
    "step_beam": (
        lambda tree, root, **given: step_beam_search(
            tree, root, lambda rows: [len(row) for row in rows], lambda step: len(step) > 1, **given
        ),
        dict(n=2, expand=2, max_steps=2, max_step_tokens=2, seed=0),
    ),
    "stochastic_beam": (stochastic_beam_search, dict(k=2, max_tokens=2, seed=0)),
}
OTHERS = {"temperature": edge_floats | numbers, "top_p": edge_floats | numbers, "top": tops, "end_ids": tokens}


@cases(quick=40, slow=2500)
@pytest.mark.parametrize("name", SEARCHES)
def test_any_arguments_of_a_search_leave_the_root_alone(name, num_cases):
    search, usual = SEARCHES[name]
    known = {
        **dict.fromkeys(usual, st.integers(-1, 3) | edge_ints.filter(lambda n: n < 5) | edge_floats | anything),
        **OTHERS,
    }
    taken = {"rollout": {"temperature", "top_p", "top"}, "best_of_n": {"temperature", "top_p", "top"},
             "mcts": {"end_ids"}, "step_beam": set(OTHERS), "stochastic_beam": {"end_ids"}}[name]  # fmt: skip
    names = [*usual, *sorted(taken)]

    def check(data):
        odd = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
        given = {**usual, **{key: data.draw(known[key], key) for key in odd}}
        with toy_tree() as tree:
            root = tree.open([5, 6])
            try:
                search(tree, root, **given)
            except (ValueError, OutOfPagesError) as error:
                assert str(error)
            tree.check_invariants()
            assert root.tokens == [5, 6]
            if name != "rollout":
                assert tree.nodes == [root]

    run_cases(num_cases, check, st.data())
