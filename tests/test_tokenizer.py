"""Text from tokens as they come: characters split over tokens, spaces, special tokens, stop strings across tokens."""

from __future__ import annotations

import io
import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import char_tokenizer

from jaxpaged.tokenizer import StopStringStream, decode_continuation, encode_continuation, load_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog and then says: naïve café ☕ 日本語 "


class ByteTokenizer:
    """One token a UTF-8 byte: most characters outside ASCII are split."""

    def encode(self, text, add_special_tokens=True):
        return list(text.encode())

    def decode(self, token_ids, skip_special_tokens=True):
        return bytes(token_ids).decode(errors="replace")


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20), model_writer=model, vocab_size=300, byte_fallback=True, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("sp") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def test_sentencepiece_adds_bos_unless_the_config_says_no(sentencepiece_file, tmp_path):
    tokenizer = load_tokenizer(sentencepiece_file)
    ids = tokenizer.encode("the dog")
    assert ids[0] == 1 and tokenizer.encode("the dog", add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids) == "the dog"
    assert tokenizer.decode([*ids, 2], skip_special_tokens=False) == "<s>the dog</s>"
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    assert load_tokenizer(tmp_path).encode("the dog") == ids[1:]


def test_a_continuation_keeps_its_leading_space(sentencepiece_file):
    tokenizer = load_tokenizer(sentencepiece_file)
    prompt, both = tokenizer.encode("the quick"), tokenizer.encode("the quick brown fox")
    assert both[: len(prompt)] == prompt
    assert tokenizer.decode(both[len(prompt) :]) == "brown fox"
    assert decode_continuation(tokenizer, prompt, both[len(prompt) :]) == " brown fox"


@pytest.mark.parametrize("make", [lambda path: ByteTokenizer(), load_tokenizer], ids=["bytes", "sentencepiece"])
def test_streamed_text_equals_decoded_text(make, sentencepiece_file):
    tokenizer = make(sentencepiece_file)
    ids = tokenizer.encode(TEXT * 2)
    prompt, output = ids[:5], ids[5:]
    stream = StopStringStream(tokenizer, prompt, ("never",), False, True)
    for token_id in output:
        assert stream.push(token_id, may_stop=True) is None
    assert stream.text == decode_continuation(tokenizer, prompt, output)


@settings(max_examples=100, deadline=None)
@given(
    st.text("ab ", min_size=1, max_size=30), st.lists(st.text("ab ", min_size=1, max_size=3), min_size=1, max_size=3)
)
def test_the_first_stop_string_to_be_complete_ends_the_text(text, stops):
    tokenizer = char_tokenizer()
    wrapped = type("T", (), {"decode": lambda self, ids, skip: tokenizer.decode(list(ids), skip_special_tokens=skip)})()
    stream = StopStringStream(wrapped, [], tuple(stops), False, True)
    ends = [end for end in range(1, len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    for end, token_id in enumerate(tokenizer.encode(text).ids, start=1):
        stop = stream.push(token_id, may_stop=True)
        if stop is not None:
            assert end == ends[0] and text[:end].endswith(stop)
            assert stream.text == text[: end - len(stop)]
            return
    assert not ends


def test_a_continuation_is_encoded_without_a_space_of_its_own(sentencepiece_file):
    tokenizer = load_tokenizer(sentencepiece_file)
    prompt = tokenizer.encode("the quick bro")
    for text in ("wn fox", " jumps", "☕"):
        ids = encode_continuation(tokenizer, prompt, text)
        assert decode_continuation(tokenizer, prompt, ids) == text
    assert tokenizer.decode([*prompt, *encode_continuation(tokenizer, prompt, "wn")]) == "the quick brown"


def test_text_that_no_tokens_add_is_refused():
    tokenizer = ByteTokenizer()
    incomplete = "é".encode()[:1]
    with pytest.raises(ValueError, match="no token ids were found that add just 'x' to a text with this end"):
        encode_continuation(_Swallowing(), list(b"ab"), "x")
    assert encode_continuation(tokenizer, list(incomplete), "x") == [ord("x")]


class _Swallowing(ByteTokenizer):
    """Writes every x away."""

    def decode(self, token_ids, skip_special_tokens=True):
        return super().decode(token_ids).replace("x", "")


def test_a_missing_or_broken_tokenizer_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.json and no tokenizer.model in"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere.json does not exist"):
        load_tokenizer(tmp_path / "nowhere.json")
    for name, message in [
        ("tokenizer.json", "not a tokenizers file"),
        ("tokenizer.model", "not a sentencepiece model"),
    ]:
        (tmp_path / name).write_text("{broken")
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path / name)
