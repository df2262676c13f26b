"""Rows of next-token log-probabilities: the likeliest, lookups, and samples."""

from __future__ import annotations

import numpy as np
import pytest

from jaxpaged.tree.tree import NextTokens

PROBABILITIES = np.array([[0.1, 0.6, 0.3, 0.0], [0.25, 0.25, 0.25, 0.25]])


def whole() -> NextTokens:
    with np.errstate(divide="ignore"):
        return NextTokens(np.log(PROBABILITIES).astype(np.float32), None)


def likeliest() -> NextTokens:
    ids, logprobs = whole().top(2)
    return NextTokens(logprobs, ids)


def test_the_likeliest_come_first_and_of_equals_the_lowest_id():
    ids, logprobs = whole().top(3)
    assert ids.tolist() == [[1, 2, 0], [0, 1, 2]]
    np.testing.assert_allclose(np.exp(logprobs[0]), [0.6, 0.3, 0.1], rtol=1e-6)
    assert likeliest().top(1)[0].tolist() == [[1], [0]]
    with pytest.raises(ValueError, match=r"top\(3\): there are log-probabilities of 1 to 2 tokens a row"):
        likeliest().top(3)


def test_lookup_by_token():
    np.testing.assert_allclose(np.exp(whole().of([2, 3])), [0.3, 0.25], rtol=1e-6)
    np.testing.assert_allclose(np.exp(likeliest().of([2, 1])), [0.3, 0.25], rtol=1e-6)
    with pytest.raises(ValueError, match="token 3 is not among the 2 likeliest of row 1: ask for a larger top"):
        likeliest().of([1, 3])
    with pytest.raises(ValueError, match="1 tokens for 2 rows"):
        whole().of([1])
    with pytest.raises(ValueError, match="outside the vocabulary of 4"):
        whole().of([1, 4])


def test_rows_of_some_nodes():
    rows = likeliest().rows([1])
    assert (len(rows), rows.token_ids.tolist()) == (1, [[0, 1]])


def frequencies(out: NextTokens, count=20_000, **options) -> np.ndarray:
    rng = np.random.default_rng(0)
    drawn = np.array([out.sample(rng, **options)[0] for _ in range(count)])
    return np.stack([np.bincount(column, minlength=4) / count for column in drawn.T])


@pytest.mark.parametrize(
    "options, first_row",
    [
        ({}, [0.1, 0.6, 0.3, 0]),
        ({"temperature": 0.5}, [0.01 / 0.46, 0.36 / 0.46, 0.09 / 0.46, 0]),
        ({"top_p": 0.85}, [0, 2 / 3, 1 / 3, 0]),
        ({"top_p": 0.6}, [0, 1, 0, 0]),
        ({"temperature": 0}, [0, 1, 0, 0]),
    ],
)
def test_samples_follow_the_probabilities(options, first_row):
    np.testing.assert_allclose(frequencies(whole(), **options)[0], first_row, atol=0.015)  # 4 standard deviations


def test_samples_from_the_likeliest_are_among_them():
    np.testing.assert_allclose(frequencies(likeliest()), [[0, 2 / 3, 1 / 3, 0], [0.5, 0.5, 0, 0]], atol=0.015)


def test_a_sample_comes_with_the_models_log_probability_and_repeats_with_its_seed():
    tokens, logprobs = whole().sample(seed=3, temperature=2.0)
    np.testing.assert_array_equal(logprobs, whole().of(tokens))
    assert whole().sample(seed=3, temperature=2.0)[0] == tokens


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="temperature must be at least 0, .*got -1"):
        whole().sample(0, temperature=-1)
    with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\], got 0"):
        whole().sample(0, top_p=0)
