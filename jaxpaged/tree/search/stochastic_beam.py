"""Stochastic beam search: k different continuations, drawn without replacement (Kool et al., 2019, arXiv 1903.06059).

A sequence's log-probability plus Gumbel noise is its key, and the k sequences with the largest keys are a sample
without replacement. The keys of all sequences behind a prefix have a maximum that is itself Gumbel distributed, so one
can draw that maximum for the root and hand it down: children get noise of their own, conditioned on the largest of them
having their parent's key. Then the k best prefixes of every length lead to the k best sequences: a beam search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxpaged.tree.search.checks import random_numbers, read_counts, read_end_ids
from jaxpaged.tree.tree import Node, Tree


@dataclass(frozen=True)
class StochasticBeam:
    """One continuation of the sample."""

    tokens: tuple[int, ...]  # the ending token included
    logprob: float
    key: float  # log-probability plus noise; the sample is ordered by it


def inclusion_probability(beam: StochasticBeam, threshold: float) -> float:
    """How likely a continuation's key is above `threshold`, for estimates of expectations.

    Search with k + 1 beams, take the last one's key for the threshold, and weight the k others by probability divided
    by this: the weighted sum of any function of them is an unbiased estimate of its mean.
    """
    return float(-np.expm1(-np.exp(beam.logprob - threshold)))


def stochastic_beam_search(
    tree: Tree,
    root: Node,
    k: int,
    max_tokens: int,
    seed: int | np.random.Generator,
    end_ids: Sequence[int] | frozenset[int] | None = None,
) -> list[StochasticBeam]:
    """Draw k continuations of `root` without replacement, the largest key first; fewer if there are no more.

    A continuation ends with one of `end_ids` (by default the model's) or at `max_tokens`. All of the vocabulary is
    looked at, k rows at a time.
    """
    k, max_tokens = read_counts(k=k, max_tokens=max_tokens)
    rng = random_numbers(seed)
    vocabulary = range(tree.vocab_size)  # no other id is ever chosen
    ends = np.array([i for i in read_end_ids(end_ids, tree.eos_token_ids) if i in vocabulary], np.int64)
    done: list[StochasticBeam] = []
    nodes = [tree.fork(root)]
    try:
        tokens: list[tuple[int, ...]] = [()]
        logprobs, keys = np.zeros(1), np.array([rng.gumbel()])
        out = tree.next_tokens(nodes)
        for step in range(max_tokens):
            sums = logprobs[:, None] + out.logprobs.astype(np.float64)  # [beams, V]
            child_keys = _child_keys(sums, keys, rng)
            # What is done keeps its key and its place among the k.
            finished = np.array([beam.key for beam in done])
            best = _largest(np.concatenate([finished, child_keys.ravel()]), k)
            done = [done[i] for i in best if i < len(finished)]
            beams, chosen = np.divmod(best[best >= len(finished)] - len(finished), tree.vocab_size)
            possible = np.isfinite(child_keys[beams, chosen])
            beams, chosen = beams[possible], chosen[possible]
            tokens = [(*tokens[b], int(t)) for b, t in zip(beams, chosen, strict=True)]
            logprobs, keys = sums[beams, chosen], child_keys[beams, chosen]
            is_done = np.isin(chosen, ends) | (step + 1 == max_tokens)
            done += [StochasticBeam(tokens[i], float(logprobs[i]), float(keys[i])) for i in np.flatnonzero(is_done)]
            going = np.flatnonzero(~is_done)
            nodes = tree.reorder(nodes, beams[going])
            if not len(going):
                break
            out = tree.append(nodes, chosen[going])
            tokens, logprobs, keys = [tokens[i] for i in going], logprobs[going], keys[going]
    finally:
        tree.free(nodes)
    return sorted(done, key=lambda beam: -beam.key)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` largest of values [N] are; all of them where there are no more."""
    return np.argpartition(-values, count - 1)[:count] if count < len(values) else np.arange(len(values))


def _child_keys(sums: np.ndarray, keys: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gumbel noise around sums [beams, V], conditioned on the largest of each row being keys [beams].

    As the paper's appendix computes it, so that nothing overflows.
    """
    noisy = sums + rng.gumbel(size=sums.shape)
    largest = noisy.max(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        v = keys[:, None] - noisy + np.log1p(-np.exp(noisy - largest))
        conditioned = keys[:, None] - np.maximum(v, 0) - np.log1p(np.exp(-np.abs(v)))
    return np.where(np.isneginf(noisy), -np.inf, conditioned)
