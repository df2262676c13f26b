"""Monte Carlo tree search with a policy (the model) and a value (a callable), as in AlphaZero (Silver et al., 2017).

Every visited position keeps its node, pinned: to come back to it costs a fork, and no token is ever computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxpaged.tree.search.checks import check_finite, random_numbers, read_counts, read_end_ids
from jaxpaged.tree.search.puct import Place, go_down, most_visited
from jaxpaged.tree.tree import Node, Tree

#: Tokens of a continuation -> how good it is, in [0, 1] for the usual constant of exploration.
Value = Callable[[list[int]], float]


@dataclass(frozen=True)
class SearchResult:
    """What the search found."""

    tokens: tuple[int, ...]  # from the root along the most visited children
    best: tuple[int, ...]  # the continuation with the highest value of all that were visited
    best_value: float
    visits: tuple[tuple[int, int, float], ...]  # of the root's children: (token, visits, mean value), most visits first


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
    num_parallel: int = 1,
) -> SearchResult:
    """Simulate: go down by PUCT, visit one new position, ask its value, and tell it to all positions above.

    A visit is a row of a step, and takes a page or none; where pages run out, OutOfPagesError ends the search.

    Args:
        value: of a continuation, complete or not; it may well be a rollout from a fork of its own.
        max_tokens, end_ids: where continuations end; positions there have no children.
        num_children: the likeliest tokens that are considered at a position.
        exploration: PUCT's constant: how much the policy and unvisited children count against known values.
        root_noise: share of Dirichlet(0.3) noise in the policy at the root; `seed` is for this alone.
        num_parallel: simulations whose new positions are visited in one step. Each of them counts as worth 0 until it
            is valued (a virtual loss), so that the next one goes elsewhere: quicker, but with less known at each turn.
    """
    num_simulations, max_tokens, num_parallel, num_children = read_counts(
        num_simulations=num_simulations, max_tokens=max_tokens, num_parallel=num_parallel, num_children=num_children
    )
    check_finite(exploration=exploration, root_noise=root_noise)
    if not 0 <= root_noise <= 1:
        raise ValueError(f"root_noise is a share, in [0, 1], got {root_noise}")
    rng = random_numbers(seed)
    ends = read_end_ids(end_ids, tree.eos_token_ids)
    top = min(num_children, tree.vocab_size)
    start = Place((), 1.0, tree.fork(root))
    visited = [start]
    try:
        _expand(tree, [start], top)
        if root_noise:
            noise = rng.dirichlet([0.3] * len(start.children)).tolist()
            for child, share in zip(start.children, noise, strict=True):
                child.prior = (1 - root_noise) * child.prior + root_noise * share
        for done in range(0, num_simulations, num_parallel):
            paths = [go_down(start, exploration) for _ in range(min(num_parallel, num_simulations - done))]
            parents = {path[-1]: path[-2] for path in paths if path[-1].node is None}
            visited += parents
            _visit(tree, parents, top)
            for place in parents:
                place.worth = float(value(list(place.tokens)))
            _expand(tree, [p for p in parents if p.tokens[-1] not in ends and len(p.tokens) < max_tokens], top)
            for path in paths:
                for above in path:
                    above.total += path[-1].worth
    finally:
        tree.free([place.node for place in visited if place.node is not None])
    best = max(visited[1:], key=lambda place: place.worth)
    ranked = sorted((child for child in start.children if child.visits), key=lambda child: -child.visits)
    visits = tuple((child.tokens[-1], child.visits, child.mean) for child in ranked)
    return SearchResult(most_visited(start), best.tokens, best.worth, visits)


def _visit(tree: Tree, parents: dict[Place, Place], top: int) -> None:
    """Give positions their nodes: one token behind those of their parents."""
    nodes = tree.fork([parent.node for parent in parents.values() if parent.node is not None])
    for place, node in zip(parents, nodes, strict=True):
        place.node = node
    tree.append(nodes, [place.tokens[-1] for place in parents], top)
    tree.pin(nodes)


def _expand(tree: Tree, places: list[Place], top: int) -> None:
    """Make the likeliest tokens behind positions their children, the likeliest first."""
    ids, logprobs = tree.next_tokens([place.node for place in places if place.node is not None], top).top(top)
    priors = np.exp(logprobs.astype(np.float64))
    priors /= priors.sum(axis=1, keepdims=True)
    for place, tokens, shares in zip(places, ids.tolist(), priors.tolist(), strict=True):
        pairs = zip(tokens, shares, strict=True)
        place.children = [Place((*place.tokens, token), prior) for token, prior in pairs if prior > 0]
