"""Texts that match: the bytes of tokens, and that only what can still become a match is ever allowed."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from tokenizer_kinds import save_all
from toy import char_tokenizer

from jaxpaged.constraints import Grammar, JsonSchema, Regex
from jaxpaged.text.matching import Matchers, fill_masks
from jaxpaged.text.token_bytes import token_bytes
from jaxpaged.text.tokenizer import JsonTokenizer, load_tokenizer

END = 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("characters") / "tokenizer.json"
    char_tokenizer().save(str(path))
    return JsonTokenizer(path)


@pytest.fixture(scope="module")
def matchers(tokenizer):
    return Matchers(tokenizer, 97)


def allowed(matcher) -> list[int]:
    words = np.full((2, 4), -1, np.int32)
    fill_masks([(1, matcher)], words)
    assert (words[0] == -1).all()
    return np.flatnonzero(np.unpackbits(words[1].view(np.uint8), bitorder="little")).tolist()


def random_text(matchers, tokenizer, constraint, ends, rng, most=30) -> tuple[str, bool]:
    """Any of the allowed tokens at each step; and whether the text came to an end."""
    matcher, token_ids = matchers.make(constraint, ends), []
    while len(token_ids) < most:
        token_id = int(rng.choice(allowed(matcher)))
        is_over = matcher.is_over_behind(token_id)
        matcher.push(token_id)
        if token_id in ends:
            return tokenizer.decode(token_ids), True
        token_ids.append(token_id)
        assert matcher.is_over == is_over
        if is_over:
            return tokenizer.decode(token_ids), True
    return tokenizer.decode(token_ids), False


@pytest.mark.parametrize("pattern", ["[ab]{2,5}c?", "(foo|bar)+ baz", r"\d{1,3}\.\d*", "x|xy|xyz"])
@pytest.mark.parametrize("ends", [{END}, {END, 50}, set()], ids=["an end", "two", "none"])
def test_whatever_is_chosen_a_text_that_ends_matches(matchers, tokenizer, pattern, ends):
    rng = np.random.default_rng(1)
    texts = [random_text(matchers, tokenizer, Regex(pattern), ends, rng) for _ in range(20)]
    assert all(re.fullmatch(pattern, text) for text, has_ended in texts if has_ended)
    assert not ends or any(has_ended for _, has_ended in texts)


def test_texts_of_a_schema_are_json_without_blanks(matchers, tokenizer):
    schema = {
        "type": "object", "required": ["a", "b"], "additionalProperties": False,
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "yy"]}},
    }  # fmt: skip
    rng = np.random.default_rng(2)
    for _ in range(20):
        text, has_ended = random_text(matchers, tokenizer, JsonSchema(schema), {END}, rng)
        value = json.loads(text)
        assert has_ended and 0 <= value["a"] <= 99 and value["b"] in ("x", "yy") and " " not in text


def test_texts_of_a_grammar_are_its_sentences(matchers, tokenizer):
    rng = np.random.default_rng(3)
    texts = [random_text(matchers, tokenizer, Grammar('start: "(" start ")" | "."'), {END}, rng) for _ in range(20)]
    assert all(re.fullmatch(r"(\(*)\.(\)*)", text) for text, has_ended in texts if has_ended)
    assert all(text.count("(") == text.count(")") for text, has_ended in texts if has_ended)


def test_a_copy_goes_its_own_way(matchers):
    matcher = matchers.make(Regex("ab|cd"), [])
    copy = matcher.copy()
    matcher.push(ord("a") - 30)
    assert allowed(matcher) == [ord("b") - 30] and allowed(copy) == [ord("a") - 30, ord("c") - 30]


def test_whatever_tokens_spell_the_text_are_allowed(tmp_path):
    tokenizer = load_tokenizer(save_all(tmp_path)["byte_level"])
    matcher, table = Matchers(tokenizer, 600).make(Regex("the cat"), []), token_bytes(tokenizer, 600)
    words = np.zeros((1, 19), np.int32)
    fill_masks([(0, matcher)], words)
    found = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
    assert found.tolist() == [i for i, piece in enumerate(table) if piece and b"the cat".startswith(piece)]
    assert len(found) > 1


REFUSED = [
    (Regex("("), "regex: .*unclosed group$"),
    (Regex("(?=a)b"), "regex: .*look-around"),
    (JsonSchema({"type": "objec"}), "json_schema: .*Invalid type: objec$"),
    (Grammar("start: x"), 'grammar: at 1.* unknown name: "x"$'),
]


@pytest.mark.parametrize("constraint, message", REFUSED)
def test_what_the_library_does_not_take_is_refused_in_its_words(matchers, constraint, message):
    with pytest.raises(ValueError, match=f"llguidance cannot follow this {message}"):
        matchers.make(constraint, [END])


def test_the_bytes_of_tokens_join_to_the_text_that_they_add(tmp_path):
    for kind, path in save_all(tmp_path).items():
        tokenizer = load_tokenizer(path)
        table = token_bytes(tokenizer, 600)
        before = tokenizer.encode("a", add_special_tokens=False)
        for text in ("the cat at on", " a b c", "été 漢字" if "byte" in kind else "cat"):
            ids = tokenizer.encode(text, add_special_tokens=False)
            added = tokenizer.decode([*before, *ids]).removeprefix(tokenizer.decode(before))
            assert b"".join(table[token_id] for token_id in ids).decode() == added, kind
