"""Text from tokens as they come: characters split over tokens, spaces, special tokens, stop strings across tokens."""

from __future__ import annotations

import io
import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import byte_fallback_bpe, sentencepiece_model
from toy import char_tokenizer

from jaxpaged.text.tokenizer import StopStringStream, decode_continuation, encode_continuation, load_tokenizer

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


CHAT = ("<|im_start|>", "<|im_end|>", "[TOOL]")


@pytest.fixture(scope="module")
def chat_model():
    """A sentencepiece model of 420 pieces; added tokens have the ids behind them."""
    return sentencepiece_model(vocab_size=420, byte_fallback=True, model_type="bpe")


def chat_tokenizer(tmp_path, model, **files):
    (tmp_path / "tokenizer.model").write_bytes(model)
    for name, values in files.items():
        (tmp_path / f"{name}.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return load_tokenizer(tmp_path)


def added(content, special=True, **flags):
    return {"content": content, "special": special, "lstrip": False, "rstrip": False, "single_word": False, **flags}


FILES = {
    "decoder": {
        "tokenizer_config": {
            "bos_token": "<s>",
            "added_tokens_decoder": {
                "1": added("<s>"), "500": added(CHAT[0]), "501": added(CHAT[1]), "502": added(CHAT[2], special=False),
            },
        }
    },
    "added_tokens": {
        "added_tokens": {CHAT[0]: 500, CHAT[1]: 501, CHAT[2]: 502},
        "special_tokens_map": {"bos_token": added("<s>"), "additional_special_tokens": [CHAT[0], CHAT[1]]},
    },
}  # fmt: skip


@pytest.mark.parametrize("files", FILES.values(), ids=FILES)
def test_added_tokens_have_their_ids_and_their_text(tmp_path, chat_model, files):
    """As in transformers 5: a space before a text, none behind an added token."""
    tokenizer = chat_tokenizer(tmp_path, chat_model, **files)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=chat_model)
    text = "<|im_start|>the\nfox<|im_end|> [TOOL]brown"
    ids = tokenizer.encode(text)
    assert ids[:2] == [1, 500] and ids[-1] != 502
    written = [pieces.id_to_piece(i) if i < 420 else CHAT[i - 500] for i in ids[1:]]
    assert "".join(written) == "<|im_start|>the<0x0A>fox<|im_end|>▁[TOOL]brown"
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == "the\nfox [TOOL]brown"
    assert tokenizer.encode("the<s>", add_special_tokens=False) == [*pieces.encode("the"), 1]
    # One by one, and behind a prompt that ends with one of them.
    start = ids.index(501) + 1
    assert decode_continuation(tokenizer, ids[:start], ids[start:], False) == " [TOOL]brown"
    assert decode_continuation(tokenizer, ids[:2], ids[2:]) == "the\nfox [TOOL]brown"
    assert decode_continuation(tokenizer, ids[:4], [501, 0x0A + 3], False) == "<|im_end|>\n"


def test_added_tokens_take_blanks_with_them_as_they_say(tmp_path, chat_model):
    tokens = {"500": added("<a>", rstrip=True), "501": added("<b>", lstrip=True), "502": added("cat", single_word=True)}
    tokenizer = chat_tokenizer(tmp_path, chat_model, tokenizer_config={"added_tokens_decoder": tokens})
    fox = tokenizer.encode("fox", add_special_tokens=False)
    behind = tokenizer.encode("<a>fox", add_special_tokens=False)[1:]
    assert tokenizer.encode("<a> \n fox", add_special_tokens=False) == [500, *behind]
    assert tokenizer.encode("fox  <b>", add_special_tokens=False) == [*fox, 501]
    assert 502 in tokenizer.encode("a cat.") and 502 not in tokenizer.encode("concat") + tokenizer.encode("cats")


def test_the_end_token_goes_behind_a_text_where_the_config_says_so(tmp_path, chat_model):
    config = {**FILES["decoder"]["tokenizer_config"], "add_eos_token": True, "eos_token": "<|im_end|>"}
    tokenizer = chat_tokenizer(tmp_path, chat_model, tokenizer_config=config)
    plain = tokenizer.encode("the fox", add_special_tokens=False)
    assert tokenizer.encode("the fox") == [1, *plain, 501]
    config = {"bos_token": None, "add_eos_token": True}
    assert chat_tokenizer(tmp_path, chat_model, tokenizer_config=config).encode("the fox") == [*plain, 2]


def test_legacy_files_put_a_space_before_every_part_of_a_text(tmp_path, chat_model):
    config = {**FILES["decoder"]["tokenizer_config"], "legacy": True}
    tokenizer = chat_tokenizer(tmp_path, chat_model, tokenizer_config=config)
    ids = tokenizer.encode("<|im_start|>the", add_special_tokens=False)
    assert ids == [500, *sentencepiece.SentencePieceProcessor(model_proto=chat_model).encode("the")]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|> the"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config", "{broken", "tokenizer_config.json is not valid JSON: Expecting"),
        ("tokenizer_config", "[" * 200_000, "tokenizer_config.json is not valid JSON: "),
        ("tokenizer_config", "[1]", "tokenizer_config.json must hold a JSON object, found list"),
        ("tokenizer_config", '{"add_bos_token": "no"}', "tokenizer_config.json: add_bos_token must be true or false"),
        ("tokenizer_config", '{"added_tokens_decoder": [1]}', "added_tokens_decoder must be an object of token ids"),
        ("tokenizer_config", '{"added_tokens_decoder": {"x": {}}}', "json: added_tokens_decoder has 'x': {}"),
        ("tokenizer_config", '{"added_tokens_decoder": {"7": {}}}', "json: token 7 of .* no text as its content"),
        ("tokenizer_config", '{"bos_token": 1}', "tokenizer_config.json or .*bos_token must be the text of a token"),
        ("tokenizer_config", '{"additional_special_tokens": 1}', "additional_special_tokens must be a list, got 1"),
        ("added_tokens", "{broken", "added_tokens.json is not valid JSON"),
        ("added_tokens", '{"<a>": "1"}', "added_tokens.json: the id of '<a>' must be an integer of at least 0"),
        ("special_tokens_map", "null", "special_tokens_map.json must hold a JSON object, found NoneType"),
    ],
)  # fmt: skip
def test_a_broken_file_beside_a_sentencepiece_model_is_named(tmp_path, chat_model, name, content, message):
    with pytest.raises(ValueError, match=message) as raised:
        chat_tokenizer(tmp_path, chat_model, **{name: content})
    assert "\n" not in str(raised.value)


def test_half_of_a_surrogate_pair_is_no_text(tmp_path, chat_model):
    byte_fallback_bpe().save(str(tmp_path / "tokenizer.json"))
    other = tmp_path / "other"
    other.mkdir()
    for tokenizer in (load_tokenizer(tmp_path), chat_tokenizer(other, chat_model)):
        with pytest.raises(ValueError, match=r"the text has a lone surrogate, '\\ud83d' at character 3"):
            tokenizer.encode("ab\ud83d")


def test_a_run_of_byte_tokens_keeps_its_characters_where_one_byte_is_wrong(tmp_path):
    byte_fallback_bpe().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    ids = [3 + byte for byte in "ကက".encode()]
    x = tokenizer.encode("x", add_special_tokens=False)[-1]
    assert tokenizer.decode([1, *ids, 3 + 0xE1, x]) == "ကက\ufffdx"
    assert tokenizer.decode([1, *ids[:-1]], skip_special_tokens=False) == "<s>က\ufffd\ufffd"
