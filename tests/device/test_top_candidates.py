"""top_candidates is lax.top_k, bit for bit, and looks at few values to be so."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpaged.device import top_candidates as module
from jaxpaged.device.top_candidates import chunk_size, top_candidates

top_candidates_jit = jax.jit(top_candidates, static_argnums=1)


def assert_is_top_k(values: np.ndarray, k: int) -> None:
    got_values, got_tokens = top_candidates_jit(jnp.asarray(values), k)
    assert (got_values.dtype, got_tokens.dtype) == (jnp.float32, jnp.int32)
    values_, tokens = jax.lax.top_k(np.where(values == 0, np.float32(0), values), k)  # which puts -0.0 behind 0.0
    np.testing.assert_array_equal(np.asarray(got_tokens), np.asarray(tokens))
    np.testing.assert_array_equal(np.asarray(got_values).view(np.int32), np.asarray(values_).view(np.int32))


@pytest.fixture
def small_chunks(monkeypatch):
    """Two selections wherever they are possible, in chunks of any size, so that small rows show every case."""
    monkeypatch.setattr(module, "MIN_CHUNK", 1)
    monkeypatch.setattr(module, "MIN_GAIN", 0)
    top_candidates_jit.clear_cache()
    yield
    top_candidates_jit.clear_cache()


def drawn(seed: int, rows: int, vocab: int, kind: str) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "normal":
        return rng.normal(size=(rows, vocab)).astype(np.float32)
    choices = {
        "ties": [0.0, -1.0, -2.0],
        "zeros": [0.0, -0.0],
        "mostly impossible": [-np.inf] * 9 + [-1.0],
        "impossible": [-np.inf],
        "extreme": [-np.inf, -3.4e38, -1e9, -1e-45, 0.0, -0.0, 3.4e38, np.inf],
    }[kind]
    return rng.choice(np.array(choices, np.float32), (rows, vocab))


KINDS = ["normal", "ties", "zeros", "mostly impossible", "impossible", "extreme"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab, k", [(1000, 1), (1000, 8), (1001, 31), (1023, 16), (257, 16), (64, 8), (65, 8)])
def test_two_selections_equal_one(small_chunks, kind, vocab, k):
    assert chunk_size(vocab, k) is not None
    for seed in range(4):
        assert_is_top_k(drawn(seed, 8, vocab, kind), k)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(97, 5), (100, 9), (128, 4), (130, 11)]), st.sampled_from(KINDS))
def test_two_selections_equal_one_whatever_the_values(seed, shape, kind):
    vocab, k = shape
    values = drawn(seed, 3, vocab, kind)
    chunk = max(1, int(round(np.sqrt(vocab / k))))  # not a power of two
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "chunk_size", lambda vocab_size, k: chunk)
        got = jax.jit(lambda x: top_candidates(x, k))(values)
    for ours, theirs in zip(got, jax.lax.top_k(np.where(values == 0, np.float32(0), values), k), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_ties_across_chunks_go_to_the_lowest_token(small_chunks):
    values = np.full((1, 64), -5.0, np.float32)
    values[0, [3, 17, 18, 40, 63]] = -1.0
    assert chunk_size(64, 4) == 4
    assert np.asarray(top_candidates_jit(values, 4)[1]).tolist() == [[3, 17, 18, 40]]
    assert np.asarray(top_candidates_jit(values, 7)[1]).tolist() == [[3, 17, 18, 40, 63, 0, 1]]


def test_the_padding_of_the_last_chunk_is_never_chosen(small_chunks):
    values = np.full((2, 65), -np.inf, np.float32)
    values[1, 64] = -1.0
    assert np.asarray(top_candidates_jit(values, 8)[1]).tolist() == [list(range(8)), [64, *range(7)]]


@pytest.mark.parametrize("vocab, k", [(97, 97), (97, 8), (1000, 999), (300, 256), (5000, 512)])
def test_small_vocabularies_and_large_k_take_one_selection(vocab, k):
    assert chunk_size(vocab, k) is None
    assert_is_top_k(drawn(0, 3, vocab, "ties"), k)


@pytest.mark.parametrize("k, chunk", [(2, 256), (8, 128), (16, 64), (128, 32), (512, 32)])
def test_large_vocabularies_are_cut_into_chunks(k, chunk):
    assert chunk_size(128_256, k) == chunk
    for kind in ("normal", "ties"):
        assert_is_top_k(drawn(1, 2, 128_256, kind), k)


def test_a_row_of_a_step_is_read_once_and_little_of_it_is_ordered():
    lowered = jax.jit(functools.partial(top_candidates, k=128)).lower(jax.ShapeDtypeStruct((4, 128_256), jnp.float32))
    compared = [line for line in lowered.as_text().splitlines() if "top_k" in line and "tensor<4x" in line]
    assert compared and not any("4x128256" in line for line in compared)
