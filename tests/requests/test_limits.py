"""Files of items."""

from __future__ import annotations

import pytest
from toy import char_tokenizer

from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.requests.limits import LimitReader
from jaxpaged.text.tokenizer import JsonTokenizer


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    path = tmp_path_factory.mktemp("characters") / "tokenizer.json"
    char_tokenizer().save(str(path))
    return LimitReader(JsonTokenizer(path), "no tokenizer")


def trie_of(reader, path):
    return reader.read(SamplingParams(constraint={"trie": str(path)}), frozenset(), 97, 16).trie


def test_items_are_lists_of_ids_and_texts(reader, tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('[5, 6]\n"ab"\n\n{"token_ids": [7]}\n{"text": "c", "id": 9}\n')
    trie = trie_of(reader, path)
    assert [trie.find(item) for item in ([5, 6], [67, 68], [7], [69])] == [0, 1, 2, 3]


def test_a_file_is_read_again_where_it_has_changed_and_only_there(reader, tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text("[5, 6]\n")
    first = trie_of(reader, path)
    assert trie_of(reader, path) is first
    path.write_text("[5, 6, 7]\n")
    assert trie_of(reader, path).find([5, 6, 7]) == 0


BAD = {
    "": "no items",
    "[1]\n[1,\n": "line 2: Expecting value",
    "[1]\n5\n": "line 2: a line must be a list of token ids",
    '{"ids": [1]}': "line 1: a line must be",
    "[1]\n\n[]\n": "item 1 of the trie must be a list of at least one",
    '[1]\n[2, "a"]\n': "item 1 of the trie has 'a', which is no token id",
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_file_of_items_is_refused_with_its_line_or_item(reader, tmp_path, text):
    path = tmp_path / "items.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=BAD[text]):
        trie_of(reader, path)
