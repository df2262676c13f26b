"""Sampling many nodes on, all in one batch, until each has had enough: what several searches are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxpaged.tree.search.checks import random_numbers, read_counts
from jaxpaged.tree.tree import Node, Tree

#: Whether a continuation, the tokens behind the node where the search began, is complete.
Stop = Callable[[list[int]], bool]


@dataclass(frozen=True)
class Rollout:
    """What one node was given."""

    tokens: tuple[int, ...]  # the stopping token included
    logprob: float  # the model's, of these tokens, whatever the temperature
    has_stopped: bool  # False: max_tokens ended it


def ends_with(token_ids: frozenset[int]) -> Stop:
    return lambda tokens: tokens[-1] in token_ids


def rollout(
    tree: Tree,
    nodes: Sequence[Node],
    max_tokens: int,
    seed: int | np.random.Generator,
    stop: Stop | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top: int | None = None,
) -> list[Rollout]:
    """Append sampled tokens to every node until its new tokens satisfy `stop` or number `max_tokens`.

    `stop` is by default the model's end of sequence. The nodes keep what was appended. A node that has stopped is not
    computed any further; all others advance in one step. `top=k` samples among the k likeliest tokens only.
    """
    rng = random_numbers(seed)
    if type(max_tokens) is not int or max_tokens != 0:  # none at all is fine
        (max_tokens,) = read_counts(max_tokens=max_tokens)
    stop = stop or ends_with(tree.eos_token_ids)
    new: list[list[int]] = [[] for _ in nodes]
    logprobs = [0.0] * len(nodes)
    has_stopped = [False] * len(nodes)
    active = list(range(len(nodes)))
    out = tree.next_tokens(nodes, top) if nodes else None
    for _ in range(max_tokens):
        if not active or out is None:
            break
        tokens, chosen = out.sample(rng, temperature, top_p)
        for i, token, logprob in zip(active, tokens, chosen.tolist(), strict=True):
            new[i].append(token)
            logprobs[i] += logprob
            has_stopped[i] = stop(new[i])
        out = tree.append([nodes[i] for i in active], tokens, top)
        kept = [row for row, i in enumerate(active) if not has_stopped[i]]
        active = [active[row] for row in kept]
        out = out.rows(kept)
    return [Rollout(tuple(t), p, s) for t, p, s in zip(new, logprobs, has_stopped, strict=True)]
