"""Monte Carlo tree search with a policy (the model) and a value (a callable), as in AlphaZero (Silver et al., 2017).

Every visited position keeps its node, pinned: to come back to it costs a fork, and no token is ever computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxpaged.tree import Node, Tree

#: Tokens of a continuation -> how good it is, in [0, 1] for the usual constant of exploration.
Value = Callable[[list[int]], float]


@dataclass(frozen=True)
class SearchResult:
    """What the search found."""

    tokens: tuple[int, ...]  # from the root along the most visited children
    best: tuple[int, ...]  # the continuation with the highest value of all that were visited
    best_value: float
    visits: tuple[tuple[int, int, float], ...]  # of the root's children: (token, visits, mean value), most visits first


@dataclass(eq=False, slots=True)
class _Place:
    """A position of the tree: what the policy says of it, and what was learnt of it and below."""

    tokens: tuple[int, ...]
    prior: float
    node: Node | None = None  # from the first visit on, pinned
    worth: float = 0.0  # its value, asked at the first visit
    visits: int = 0
    total: float = 0.0
    children: list[_Place] = field(default_factory=list)  # the likeliest first

    @property
    def mean(self) -> float:
        return self.total / self.visits if self.visits else 0.0


def monte_carlo_tree_search(
    tree: Tree,
    root: Node,
    value: Value,
    num_simulations: int,
    max_tokens: int,
    seed: int | np.random.Generator = 0,
    num_children: int = 8,
    exploration: float = 1.0,
    root_noise: float = 0.0,
    end_ids: Sequence[int] | frozenset[int] | None = None,
) -> SearchResult:
    """Simulate: go down by PUCT, visit one new position, ask its value, and tell it to all positions above.

    Every visit is a step with one row, and takes a page or none; where pages run out, OutOfPagesError ends the search.

    Args:
        value: of a continuation, complete or not; it may well be a rollout from a fork of its own.
        max_tokens, end_ids: where continuations end; positions there have no children.
        num_children: the likeliest tokens that are considered at a position.
        exploration: PUCT's constant: how much the policy and unvisited children count against known values.
        root_noise: share of Dirichlet(0.3) noise in the policy at the root; `seed` is for this alone.
    """
    if num_simulations < 1 or max_tokens < 1:
        raise ValueError(f"num_simulations and max_tokens must be at least 1, got {num_simulations} and {max_tokens}")
    rng = np.random.default_rng(seed)
    ends = tree.eos_token_ids if end_ids is None else frozenset(end_ids)
    top = min(num_children, tree.vocab_size)
    start = _Place((), 1.0, tree.fork(root))
    visited = [start]
    try:
        _expand(tree, start, top)
        if root_noise:
            noise = rng.dirichlet([0.3] * len(start.children)).tolist()
            for child, share in zip(start.children, noise, strict=True):
                child.prior = (1 - root_noise) * child.prior + root_noise * share
        for _ in range(num_simulations):
            path = [start]
            while path[-1].children:
                path.append(_select(path[-1], exploration))
            place = path[-1]
            if place.node is None:
                visited.append(place)
                _visit(tree, place, path[-2], top)
                place.worth = float(value(list(place.tokens)))
                if place.tokens[-1] not in ends and len(place.tokens) < max_tokens:
                    _expand(tree, place, top)
            for above in path:
                above.visits += 1
                above.total += place.worth
    finally:
        tree.free([place.node for place in visited if place.node is not None])
    best = max(visited[1:], key=lambda place: place.worth)
    ranked = sorted((child for child in start.children if child.visits), key=lambda child: -child.visits)
    visits = tuple((child.tokens[-1], child.visits, child.mean) for child in ranked)
    return SearchResult(_most_visited(start), best.tokens, best.worth, visits)


def _visit(tree: Tree, place: _Place, parent: _Place, top: int) -> None:
    """Give a position its node: one token behind its parent's."""
    assert parent.node is not None
    node = place.node = tree.fork(parent.node)
    tree.append(node, place.tokens[-1], top)
    tree.pin(node)


def _expand(tree: Tree, place: _Place, top: int) -> None:
    """Make the likeliest tokens behind a position its children, the likeliest first."""
    assert place.node is not None
    ids, logprobs = tree.next_tokens(place.node, top).top(top)
    priors = np.exp(logprobs[0].astype(np.float64))
    pairs = zip(ids[0].tolist(), (priors / priors.sum()).tolist(), strict=True)
    place.children = [_Place((*place.tokens, token), prior) for token, prior in pairs if prior > 0]


def _select(place: _Place, exploration: float) -> _Place:
    scale = exploration * math.sqrt(place.visits + 1)
    return max(place.children, key=lambda child: child.mean + scale * child.prior / (1 + child.visits))


def _most_visited(place: _Place) -> tuple[int, ...]:
    while visited := [child for child in place.children if child.visits]:
        place = max(visited, key=lambda child: child.visits)
    return place.tokens
