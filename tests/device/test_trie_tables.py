"""Tries on the device: what may follow a node, and where a token leads, are what the trie itself says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.api.trie import Trie
from jaxpaged.device.constraints import advance, allowed_bits, limit
from jaxpaged.host.constraints import trie_set
from jaxpaged.host.constraints.trie_set import TrieSet
from jaxpaged.step_io import DEAD_NODE, FREE_NODE

VOCABULARY = 97


def some_tries() -> list[Trie]:
    rng = np.random.default_rng(3)
    bushy = Trie.from_sequences([[token, token % 7] for token in range(90)])
    return [bushy, Trie.from_sequences([rng.integers(0, 97, rng.integers(1, 5)).tolist() for _ in range(300)])]


def tokens_of(words: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()


@pytest.mark.parametrize("most_listed", [0, 4, 256], ids=["bits alone", "bits and lists", "lists alone"])
def test_what_may_follow_a_node_are_its_children(monkeypatch, most_listed):
    monkeypatch.setattr(trie_set, "MAX_LISTED", most_listed)
    tries = some_tries()
    all_of_them = TrieSet(tuple(tries))
    tables = jax.device_put(all_of_them.tables(VOCABULARY))
    for trie in tries:
        nodes = np.arange(len(trie.items)) + all_of_them.root(trie)
        bits = np.asarray(jax.jit(allowed_bits)(tables, jnp.asarray(nodes, jnp.int32)))
        for node, words in enumerate(bits):
            children = trie.keys[trie.first_edges[node] : trie.first_edges[node + 1]] & 0xFFFFFFFF
            assert tokens_of(words) == children.tolist()


def test_every_token_leads_where_the_trie_says():
    tries = some_tries()
    all_of_them = TrieSet(tuple(tries))
    tables = jax.device_put(all_of_them.tables(VOCABULARY))
    for trie in tries:
        nodes, tokens = (each.ravel() for each in np.meshgrid(np.arange(len(trie.items)), np.arange(VOCABULARY)))
        root, expected = all_of_them.root(trie), trie.advance(nodes, tokens)
        found = jax.jit(advance)(tables, jnp.asarray(nodes + root, jnp.int32), jnp.asarray(tokens, jnp.int32))
        assert np.asarray(found).tolist() == np.where(expected < 0, DEAD_NODE, expected + root).tolist()


def test_a_row_without_a_trie_stays_free_and_a_dead_one_dead():
    tables = jax.device_put(TrieSet(tuple(some_tries())).tables(VOCABULARY))
    nodes, tokens = jnp.array([FREE_NODE, DEAD_NODE], jnp.int32), jnp.array([5, 5], jnp.int32)
    assert jax.jit(advance)(tables, nodes, tokens).tolist() == [FREE_NODE, DEAD_NODE]
    left = jax.jit(lambda logits: limit(logits, allowed_bits(tables, nodes)))(np.ones((2, VOCABULARY), np.float32))
    assert np.asarray(left).tolist() == [[1.0] * VOCABULARY, [-np.inf] * VOCABULARY]
