"""The toy language model: a function of the prefix behind the same tree, with real pages under it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from beam_reference import _generator, beam_search

from jaxpaged.tree.toy import ToyLM
from jaxpaged.tree.tree import OutOfPagesError

#: Beam width, early_stopping, length_penalty and the finished hypotheses of transformers' beam search, best first.
GOLDENS = [
    (4, False, 1.0, [
        ([1, 4, 7, 4, 10, 4, 3, 3, 9, 7, 3], -0.592738), ([1, 4, 7, 4, 3, 4, 3, 7, 8, 4, 9], -0.666014),
        ([1, 4, 7, 4, 10, 4, 3, 3, 2], -0.729743), ([1, 4, 7, 4, 3, 4, 3, 7, 8, 4, 0], -0.759828),
    ]),
    (4, True, 1.0, [
        ([1, 4, 7, 4, 10, 4, 3, 3, 2], -0.729743), ([1, 4, 7, 4, 5, 6, 7, 2], -0.775516),
        ([1, 4, 7, 4, 10, 4, 5, 2], -0.828131), ([1, 4, 7, 4, 10, 2], -0.961538),
    ]),
    (3, False, 0.0, [
        ([1, 4, 7, 4, 10, 2], -2.884613), ([1, 4, 7, 4, 5, 6, 7, 2], -3.877578),
        ([1, 4, 7, 4, 10, 4, 5, 2], -4.140654),
    ]),
    (2, "never", 2.0, [
        ([1, 4, 7, 4, 10, 4, 3, 3, 9, 7, 3], -0.074092), ([1, 4, 7, 4, 10, 4, 3, 3, 5, 5, 1], -0.095937),
    ]),
]  # fmt: skip


def golden_logits(prefix: list[int]) -> np.ndarray:
    return (2 * _generator(prefix, b"").standard_normal(11)).astype(np.float32)


@pytest.mark.parametrize("width, early_stopping, length_penalty, expected", GOLDENS)
def test_beam_search_on_a_tree_finds_the_golden_hypotheses(width, early_stopping, length_penalty, expected):
    """Every step forks the surviving parents, appends to the forks and frees the rest."""
    with ToyLM(golden_logits, 11, page_size=2).tree() as tree:
        beams = {(1, 4, 7): tree.open([1, 4, 7])}

        def logprobs_of(lists):
            wanted = dict.fromkeys(map(tuple, lists))
            new = [tokens for tokens in wanted if tokens not in beams]
            forks = tree.fork([beams[tokens[:-1]] for tokens in new])
            tree.append(forks, [tokens[-1] for tokens in new])
            beams.update(zip(new, forks, strict=True))
            for tokens in set(beams) - set(wanted):
                tree.free(beams.pop(tokens))
            tree.check_invariants()
            return tree.next_tokens([beams[tuple(tokens)] for tokens in lists]).logprobs

        found = beam_search(logprobs_of, [1, 4, 7], width, 8, {2}, length_penalty, early_stopping)
        assert [tokens for tokens, _, _ in found] == [tokens for tokens, _ in expected]
        np.testing.assert_allclose([score for _, score, _ in found], [score for _, score in expected], atol=2e-6)
        assert tree.stats().copies > 0


def test_the_function_is_given_the_prefix_and_what_it_says_is_normalised():
    prefixes = []

    def logits(prefix):
        prefixes.append(prefix)
        return np.log([1, 2, 1]) + 5.0

    with ToyLM(logits, 3, eos_token_ids=[2]).tree() as tree:
        node = tree.open([0, 1])
        out = tree.append(node, [1, 2])
        assert prefixes == [[0, 1], [0, 1, 1], [0, 1, 1, 2]]
        np.testing.assert_allclose(np.exp(out.logprobs), [[0.25, 0.5, 0.25]], rtol=1e-6)
        np.testing.assert_allclose(np.exp(out.token_logprobs[0]), [0.5, 0.25], rtol=1e-6)
        assert out.token_ranks[0].tolist() == [1, 2]
        assert tree.eos_token_ids == {2}


def test_pages_run_out_as_those_of_a_model_do():
    with ToyLM(lambda prefix: [0.0, 0.0], 2, page_size=2, num_pages=4).tree() as tree:
        node = tree.open([0, 1, 0])
        kids = tree.fork(node, 2)
        with pytest.raises(
            OutOfPagesError, match="0 new pages of 2 tokens and 2 for copies of shared ones, and 1 of 3"
        ):
            tree.append(kids, [0, 1])
        tree.free(node)
        tree.append(kids, [0, 1])
        assert (tree.stats().logical, tree.stats().physical, tree.stats().copies) == (4, 3, 1)


def test_several_toys_and_trees_are_independent():
    toy = ToyLM(lambda prefix: [0.0, 1.0], 2)
    with toy.tree() as first, toy.tree() as second:
        first.open([0])
        with pytest.raises(ValueError, match="belongs to another tree"):
            second.fork(first.nodes[0])


@pytest.mark.parametrize(
    "logits, reason",
    [
        ([0.0, 0.0], r"logits_fn\(\[1\]\) has shape \(2,\); needed is a logit for each of 3 tokens"),
        ([0.0, np.nan, 0.0], r"logits_fn\(\[1\]\) has NaN or \+inf, or nothing that is possible"),
        ([-np.inf] * 3, "nothing that is possible"),
    ],
)
def test_a_function_that_gives_no_distribution_is_reported_and_nothing_is_opened(logits, reason):
    with ToyLM(lambda prefix: logits, 3).tree() as tree:
        with pytest.raises(ValueError, match=reason):
            tree.open([1])
        assert (tree.nodes, tree.stats().physical) == ([], 0)


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="vocab_size must be a positive integer, got 0"):
        ToyLM(lambda prefix: [], 0)
    with pytest.raises(ValueError, match=r"eos_token_ids \[5\] are outside the vocabulary of 3"):
        ToyLM(lambda prefix: [], 3, eos_token_ids=[5])


def test_toys_and_searches_need_no_jax():
    program = "import sys, jaxpaged.tree.toy, jaxpaged.tree.search; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
