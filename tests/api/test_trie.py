"""Tries: what they are made of, what they find, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpaged.constraints import Trie

ITEMS = [[5, 6], [5], [7, 8, 9], [5, 6], [5, 4]]


def test_items_are_found_by_the_number_of_the_first_that_is_equal():
    trie = Trie.from_sequences(ITEMS)
    assert trie.num_items == 4
    assert [trie.find(item) for item in ITEMS] == [0, 1, 2, 0, 4]
    assert [trie.find(other) for other in ([], [7], [7, 8], [6], [5, 6, 1], [7, 8, 9, 9], [-1], [2**40])] == [None] * 8


def test_children_lie_side_by_side_in_the_order_of_their_tokens():
    trie = Trie.from_sequences(ITEMS)
    assert trie.first_tokens().tolist() == [5, 7]
    assert (trie.keys >> 32).tolist() == [0, 0, 1, 1, 2, 5]  # parents
    assert (trie.keys & 0xFFFFFFFF).tolist() == [5, 7, 4, 6, 8, 9]
    assert trie.first_edges.tolist() == [0, 2, 4, 5, 5, 5, 6, 6]


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=20))
def test_a_trie_has_its_sequences_and_no_others(items):
    trie = Trie.from_sequences(items)
    assert trie.num_items == len(set(map(tuple, items)))
    beginnings = {tuple(item[:length]) for item in items for length in range(len(item) + 1)}
    assert len(trie.items) == len(beginnings)
    for beginning in beginnings:
        found = trie.find(beginning)
        assert (None if found is None else items[found]) == (list(beginning) if list(beginning) in items else None)


def test_arrays_and_lists_make_the_same_trie():
    array = np.random.default_rng(0).integers(0, 50, (200, 3))
    one, other = Trie.from_sequences(array), Trie.from_sequences(array.tolist())
    assert one.keys.tolist() == other.keys.tolist() and one.items.tolist() == other.items.tolist()


def test_an_item_that_others_begin_with_ends_by_an_end_token():
    trie = Trie.from_sequences(ITEMS).with_ends(frozenset([1, 2]))
    assert trie.find([5]) is None and trie.find([5, 1]) is not None and trie.find([5, 2]) is not None
    assert trie.find([5, 6]) is not None and trie.find([5, 6, 1]) is None


def test_without_such_items_the_trie_stays_as_it_is():
    trie = Trie.from_sequences([[1, 2], [3], [1, 4]])
    assert trie.with_ends(frozenset([9])) is trie and trie.with_ends(frozenset()) is trie


def test_items_below_min_tokens_are_left_out():
    trie = Trie.from_sequences([[5], [5, 6], [7, 1], [7, 8]]).with_ends(frozenset([1]), min_tokens=2)
    assert [trie.find(item) is not None for item in ([5], [5, 1], [5, 6], [7, 1], [7, 8])] == [
        False, False, True, False, True,
    ]  # fmt: skip


BAD = {
    "no items": ([], "no items"),
    "an empty item": ([[1], []], "item 1 .*at least one token id"),
    "a number": (5, "list of lists of token ids, got 5"),
    "a text": (["ab"], "item 0 .*got 'ab'"),
    "a token below 0": ([[1], [2], [-3]], "item 2 .*-3, which is no token id"),
    "a token beyond all": ([[1], [10**30]], "item 1 .*no token id"),
    "half a token": ([[1, 0.5]], "item 0 .*0.5, which is no token id"),
    "a flag": ([[True]], "item 0 .*True, which is no token id"),
    "an empty array": (np.zeros((0, 3), int), "no items"),
    "an array of floats": (np.zeros((2, 3)), "item 0 .*0.0, which is no token id"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_trie_is_refused_with_the_items_number(name):
    sequences, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        Trie.from_sequences(sequences)


def test_what_a_request_cannot_use_is_refused_with_the_items_number():
    trie = Trie.from_sequences(ITEMS)
    with pytest.raises(ValueError, match="item 2 of the trie has token id 9; the vocabulary has ids 0 to 8"):
        trie.check_tokens(9)
    with pytest.raises(ValueError, match="item 2 of the trie has 3 tokens, and an output at most 2"):
        trie.check_lengths(2)
    with pytest.raises(ValueError, match="item 1 of the trie is the beginning of another"):
        trie.with_ends(frozenset())
    with pytest.raises(ValueError, match="item 2 of the trie goes on behind token id 8, which ends an output"):
        trie.with_ends(frozenset([8]))
    with pytest.raises(ValueError, match="no item of the trie has min_tokens=4 tokens: the longest has 3"):
        trie.with_ends(frozenset([1]), min_tokens=4)
