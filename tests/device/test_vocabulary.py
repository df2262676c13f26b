"""Rows of logits looked at chunk by chunk give what looking at them whole gives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.device import vocabulary

CHUNK = vocabulary.CHUNK


@pytest.mark.parametrize("size", [1, 50, CHUNK, 3 * CHUNK + 17])
def test_argmax_and_logsumexp_are_those_of_the_whole_row(size):
    logits = np.random.default_rng(size).normal(0, 3, (5, size)).astype(np.float32)
    logits[1] = np.round(logits[1])  # many are equal: the lowest token wins
    logits[2, : size // 2] = -np.inf
    np.testing.assert_array_equal(vocabulary.argmax(jnp.asarray(logits)), logits.argmax(-1))
    np.testing.assert_allclose(vocabulary.logsumexp(jnp.asarray(logits)), jax.nn.logsumexp(logits, axis=-1), rtol=1e-6)


def test_rows_without_a_largest_number_are_told():
    size = 2 * CHUNK
    rows = np.zeros((3, size), np.float32)
    rows[0], rows[1, size - 5], rows[2, size - 5] = -np.inf, np.nan, np.inf
    assert vocabulary.argmax(jnp.asarray(rows)).tolist() == [0, size - 5, size - 5]
    sums = vocabulary.logsumexp(jnp.asarray(rows))
    assert sums[0] == -np.inf and np.isnan(sums[1]) and sums[2] == np.inf


def test_draws_follow_the_softmax_over_all_chunks():
    """Frequencies of 40,000 draws against the probabilities of 6 tokens in 3 chunks, one of which is impossible."""
    draws = 40_000
    tokens = np.array([0, 3, CHUNK - 1, CHUNK, 2 * CHUNK + 5, 2 * CHUNK + 6])
    shares = np.array([0.3, 0.25, 0.2, 0.15, 0.1, 0.0])
    logits = np.full((1, 2 * CHUNK + 9), -np.inf, np.float32)
    with np.errstate(divide="ignore"):
        logits[0, tokens] = np.log(shares) * 0.5 + 7  # a temperature of 0.5 gives the shares
    count = vocabulary.num_random(logits.shape[1])

    @jax.jit
    def draw(key):
        noise = jax.random.gumbel(key, (1, count))
        return vocabulary.draw(jnp.asarray(logits), lambda values: values / 0.5, noise)[0]

    drawn = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), draws)))
    assert np.isin(drawn, tokens[:-1]).all()
    for token, share in zip(tokens, shares, strict=True):
        deviation = np.sqrt(share * (1 - share) / draws)
        assert (drawn == token).mean() == pytest.approx(share, abs=5 * deviation + 1e-9)


def test_scaled_draws_do_not_overflow():
    logits = jnp.asarray([[1e30, 3e38, -3e38, 0.0]], jnp.float32)
    noise = jnp.zeros((1, vocabulary.num_random(4)))
    assert vocabulary.draw(logits, lambda values: values - 3e38, noise).tolist() == [1]
