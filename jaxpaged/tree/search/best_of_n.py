"""Best of n: many independent samples of one prompt, judged by likelihood and by a vote over their answers.

Self-consistency (Wang et al., 2023, arXiv 2203.11171): what most samples answer is right more often than what the
likeliest sample answers. The samples share the prompt's pages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np

from jaxpaged.tree.search.checks import random_numbers, read_counts
from jaxpaged.tree.search.rollout import Rollout, Stop, rollout
from jaxpaged.tree.tree import Node, Tree


@dataclass(frozen=True)
class BestOfN:
    """All samples, and the two winners."""

    samples: tuple[Rollout, ...]  # in the order in which they were drawn
    answers: tuple[Hashable, ...]  # of each sample; None: none could be extracted
    votes: tuple[tuple[Hashable, int], ...]  # (answer, samples that gave it), most first; without None
    likeliest: Rollout

    @property
    def majority(self) -> Hashable:
        """The answer with the most votes; None if no sample has one."""
        return self.votes[0][0] if self.votes else None

    @property
    def best(self) -> Rollout:
        """The likeliest of the samples that give the majority's answer."""
        winners = [s for s, answer in zip(self.samples, self.answers, strict=True) if answer == self.majority]
        return max(winners, key=lambda sample: sample.logprob)


def best_of_n(
    tree: Tree,
    root: Node,
    n: int,
    max_tokens: int,
    seed: int | np.random.Generator,
    extract: Callable[[list[int]], Hashable] = tuple,
    stop: Stop | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top: int | None = None,
) -> BestOfN:
    """Draw n continuations of `root` together and vote.

    Args:
        extract: tokens of a continuation -> its answer, None where it has none; by default all of its tokens.
        stop: tokens of a continuation -> whether it is complete; by default the model's end of sequence.
        temperature, top_p, top: how tokens are drawn; `top=k` among the k likeliest only.
    """
    n, max_tokens = read_counts(n=n, max_tokens=max_tokens)
    rng = random_numbers(seed)
    nodes = tree.fork(root, n)
    try:
        samples = tuple(rollout(tree, nodes, max_tokens, rng, stop, temperature, top_p, top))
    finally:
        tree.free(nodes)
    answers = tuple(extract(list(sample.tokens)) for sample in samples)
    counts = Counter(answer for answer in answers if answer is not None)
    # Of answers with as many votes, the one with the likeliest sample goes first.
    likelihood = {a: max(s.logprob for s, b in zip(samples, answers, strict=True) if b == a) for a in counts}
    votes = sorted(counts.items(), key=lambda vote: (-vote[1], -likelihood[vote[0]]))
    return BestOfN(samples, answers, tuple(votes), max(samples, key=lambda sample: sample.logprob))
