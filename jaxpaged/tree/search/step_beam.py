"""Step-level beam search: a scorer, such as a process reward model, decides after every step of a solution.

As in Hugging Face's search-and-learn (after Snell et al., 2024, arXiv 2408.03314): n beams are sampled to the end of a
step, scored, and the best n / M of them go on, M times each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxpaged.tree.search.checks import random_numbers, read_counts, read_end_ids
from jaxpaged.tree.search.rollout import Rollout, Stop, rollout
from jaxpaged.tree.tree import Node, Tree

#: Continuations so far -> one number each, the larger the better; called once a step, for all of them.
Scorer = Callable[[list[list[int]]], Sequence[float]]


@dataclass(frozen=True)
class StepBeam:
    """One solution, complete or not."""

    tokens: tuple[int, ...]
    score: float  # the scorer's, of all of its tokens
    logprob: float
    num_steps: int
    is_complete: bool  # it ended with one of the end ids


def step_beam_search(
    tree: Tree,
    root: Node,
    scorer: Scorer,
    ends_step: Stop,
    n: int,
    expand: int,
    max_steps: int,
    max_step_tokens: int,
    seed: int | np.random.Generator,
    end_ids: Sequence[int] | frozenset[int] | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top: int | None = None,
) -> list[StepBeam]:
    """Search for continuations of `root` that the scorer likes; the complete ones and those in progress, best first.

    Args:
        ends_step: tokens of the present step -> whether it is complete, such as a delimiter at its end.
        n: beams that are sampled and scored at every step.
        expand: M; the best n / M beams go on, M times each. A complete beam is set aside and takes no place.
        max_steps, max_step_tokens: where a solution, and a step, is cut off.
        end_ids: tokens that complete a solution, by default the model's; they end a step too.
        temperature, top_p, top: how tokens are drawn; `top=k` among the k likeliest only.
    """
    n, expand, max_steps, max_step_tokens = read_counts(
        n=n, expand=expand, max_steps=max_steps, max_step_tokens=max_step_tokens
    )
    if n % expand:
        raise ValueError(f"n must be a multiple of expand, got n={n} and expand={expand}")
    rng = random_numbers(seed)
    ends = read_end_ids(end_ids, tree.eos_token_ids)

    def is_complete(step: list[int]) -> bool:
        return step[-1] in ends or ends_step(step)

    complete: list[StepBeam] = []
    nodes, beams = tree.fork(root, n), [StepBeam((), 0.0, 0.0, 0, False)] * n
    try:
        for step in range(1, max_steps + 1):
            steps = rollout(tree, nodes, max_step_tokens, rng, is_complete, temperature, top_p, top)
            beams = _scored(beams, steps, scorer, ends)
            complete += [beam for beam in beams if beam.is_complete]
            open_beams = [i for i, beam in enumerate(beams) if not beam.is_complete]
            if len(complete) >= n or not open_beams or step == max_steps:
                beams = [beams[i] for i in open_beams]
                break
            best = sorted(open_beams, key=lambda i: -beams[i].score)[: n // expand]
            parents = [i for i in best for _ in range(expand)]
            nodes, beams = tree.reorder(nodes, parents), [beams[i] for i in parents]
    finally:
        tree.free(nodes)
    return sorted([*complete, *beams], key=lambda beam: -beam.score)


def _scored(
    beams: list[StepBeam], steps: list[Rollout], scorer: Scorer, ends: Sequence[int] | frozenset[int]
) -> list[StepBeam]:
    """The beams with one step more."""
    tokens = [(*beam.tokens, *step.tokens) for beam, step in zip(beams, steps, strict=True)]
    scores = list(scorer([list(row) for row in tokens]))
    if len(scores) != len(tokens):
        raise ValueError(f"the scorer gave {len(scores)} scores for {len(tokens)} continuations")
    return [
        StepBeam(row, float(score), beam.logprob + step.logprob, beam.num_steps + 1, row[-1] in ends)
        for row, score, beam, step in zip(tokens, scores, beams, steps, strict=True)
    ]
