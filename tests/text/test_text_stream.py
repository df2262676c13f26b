"""Whatever the tokenizer, pieces join to the decoded whole, from any cut of any text; and stop strings are found."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import save_all, texts
from tokenizers import Tokenizer

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.text.beam_text import BeamText
from jaxpaged.text.stream import StopStringStream, decode_continuation, text_pieces
from jaxpaged.text.tokenizer import load_tokenizer

#: How byte-level tokenizers spell a byte: as itself where it can be seen, else as one of the letters from U+0100.
BYTE_LEVEL = {b: chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
BYTE_LEVEL |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in BYTE_LEVEL)}
KINDS = ("spm_bytes", "spm_unigram", "spm_plain", "byte_level", "byte_fallback", "unigram", "library")


class LibraryTokenizer:
    """A user's own object: for one byte too many the library's decoder writes a whole run of bytes as U+FFFD."""

    def __init__(self, path):
        self._model = Tokenizer.from_file(str(path))

    def encode(self, text, add_special_tokens=True):
        return self._model.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids, skip_special_tokens=True):
        return self._model.decode(list(token_ids), skip_special_tokens)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    files = save_all(tmp_path_factory.mktemp("tokenizers"))
    made = {name: load_tokenizer(path) for name, path in files.items()}
    return {**made, "library": LibraryTokenizer(files["byte_fallback"])}


def check_cut(tokenizer, text, cut):
    """At any place where the tokens of a text may be cut, what comes before and behind joins to the whole."""
    ids = tokenizer.encode(text)
    cut %= len(ids) + 1
    whole = tokenizer.decode(ids)
    pieces = text_pieces(tokenizer.decode, ids[:cut], ids[cut:])
    added = "".join(pieces)
    assert added == decode_continuation(tokenizer, ids[:cut], ids[cut:])
    assert whole.endswith(added)
    before = decode_continuation(tokenizer, [], ids[:cut], is_finished=False)
    if "\ufffd" not in text:  # else its last bytes write what its first ones have written alone
        assert before + added == whole
    assert "".join(text_pieces(tokenizer.decode, [], ids)) == whole
    stream = StopStringStream(tokenizer, ids[:cut], ("never",), False, True)
    assert [stream.push(token_id, may_stop=True) for token_id in ids[cut:]] == [None] * len(pieces)
    assert stream.text == added.rstrip("\ufffd")  # which the next token might complete


def with_known_characters(kind, text):
    """In what the library decodes, a real U+FFFD cannot be told from bytes that it gives up on."""
    return text.replace("\ufffd", "?") if kind == "library" else text


def check_stop(tokenizer, text, cut, start, length):
    """A stop string ends a sample and a beam with the token that completes it."""
    ids = tokenizer.encode(text)
    cut %= len(ids) + 1
    output = ids[cut:]
    added = decode_continuation(tokenizer, ids[:cut], output)
    stop = added[start % max(1, len(added)) :][:length].rstrip("\ufffd")  # found with the token behind it
    if not stop:
        return
    done = [decode_continuation(tokenizer, ids[:cut], output[:n], is_finished=False) for n in range(len(output) + 1)]
    expected = next(n for n, text in enumerate(done) if stop in text)
    stream = StopStringStream(tokenizer, ids[:cut], (stop,), False, True)
    found = next(n for n, token_id in enumerate(output, start=1) if stream.push(token_id, may_stop=True))
    assert (found, stream.text) == (expected, added[: added.index(stop)])
    beam = BeamText(tokenizer, ids[:cut], BeamSearchParams(beam_width=1, stop=[stop]))
    assert [beam.find_stop(output[:n]) is not None for n in range(expected + 1)] == [False] * expected + [True]
    assert beam.of_output(output[:expected], ended_by_token=False) == (stream.text, stop)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(text=texts, cut=st.integers(0, 200))
def test_pieces_from_any_cut_join_to_the_decoded_whole(tokenizers, kind, text, cut):
    check_cut(tokenizers[kind], with_known_characters(kind, text), cut)


@pytest.mark.parametrize("kind", ("spm_bytes", "byte_level", "byte_fallback"))
@settings(max_examples=40, deadline=None)
@given(
    runs=st.lists(st.tuples(st.sampled_from("éက😀\ufffda"), st.integers(0, 3), st.integers(1, 4)), max_size=12),
    cut=st.integers(0, 40),
)
def test_bytes_that_are_no_character_are_written_as_the_whole_writes_them(tokenizers, kind, runs, cut):
    """Characters without their first bytes, or their last: what a model may write, whatever it was taught."""
    tokenizer = tokenizers[kind]
    ids = [i for character, start, end in runs for i in byte_ids(tokenizer, character.encode()[start:end])]
    cut %= len(ids) + 1
    added = "".join(text_pieces(tokenizer.decode, ids[:cut], ids[cut:]))
    assert added == decode_continuation(tokenizer, ids[:cut], ids[cut:])
    assert "".join(text_pieces(tokenizer.decode, [], ids)) == tokenizer.decode(ids)
    assert tokenizer.decode(ids).endswith(added)


def byte_ids(tokenizer, data):
    """The tokens of single bytes."""
    model = tokenizer._model
    if hasattr(model, "piece_to_id"):
        return [model.piece_to_id(f"<0x{byte:02X}>") for byte in data]
    is_byte_level = model.token_to_id("<0x00>") is None
    return [model.token_to_id(BYTE_LEVEL[byte] if is_byte_level else f"<0x{byte:02X}>") for byte in data]


@pytest.mark.parametrize("kind", ("byte_fallback", "library", "spm_bytes"))
def test_a_letter_of_byte_tokens_is_found_behind_a_prompt_of_them(tokenizers, kind):
    tokenizer = tokenizers[kind]
    prompt, ids = tokenizer.encode("ကကက"), tokenizer.encode("ကကကက")
    assert ids[: len(prompt)] == prompt and len(ids) == len(prompt) + 3
    assert decode_continuation(tokenizer, prompt, ids[-3:]) == "က"
    stream = StopStringStream(tokenizer, prompt, ("က",), True, True)
    assert [stream.push(token_id, may_stop=True) for token_id in ids[-3:]] == [None, None, "က"]
    assert stream.text == "က"


@pytest.mark.parametrize("kind", ("byte_fallback", "library", "spm_bytes", "byte_level"))
def test_a_character_belongs_to_the_tokens_that_complete_it(tokenizers, kind):
    tokenizer = tokenizers[kind]
    before, after = tokenizer.encode('"'), tokenizer.encode("abc", add_special_tokens=False)
    emoji = byte_ids(tokenizer, "😀".encode())
    abc = decode_continuation(tokenizer, [*before, *emoji], after)
    for cut in range(4):
        prompt, output = [*before, *emoji[:cut]], [*emoji[cut:], *after]
        assert decode_continuation(tokenizer, prompt, output) == "😀" + abc
        assert text_pieces(tokenizer.decode, prompt, output)[: 4 - cut] == [""] * (3 - cut) + ["😀"]
        # What never becomes a character is the prompt's where the prompt wrote it.
        assert decode_continuation(tokenizer, prompt, after) == abc
        assert decode_continuation(tokenizer, prompt, output[:1], is_finished=False) == ("😀" if cut == 3 else "")
    assert decode_continuation(tokenizer, before, emoji[:1]) == "\ufffd"


@pytest.mark.parametrize("kind", ("spm_bytes", "spm_plain"))
def test_a_token_without_a_text_counts_for_those_behind_it(tokenizers, kind):
    """Behind a BOS token that is written, sentencepiece leaves out one space, not two."""
    tokenizer = tokenizers[kind]
    space = tokenizer._model.piece_to_id("▁")
    ids = [1, space, space, *tokenizer.encode("a", add_special_tokens=False)[-1:]]
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    assert whole.startswith("<s> ")
    for cut in (0, 1):
        pieces = text_pieces(tokenizer.decode, ids[:cut], ids[cut:], skip_special_tokens=False)
        assert "".join(pieces) == whole[3 * cut :]
        assert pieces[1 - cut : 3 - cut] == ["", " "]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(text=texts, cut=st.integers(0, 200), start=st.integers(0, 50), length=st.integers(1, 4))
def test_stop_strings_are_found_where_they_are_complete(tokenizers, kind, text, cut, start, length):
    check_stop(tokenizers[kind], text, cut, start, length)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=800, deadline=None)
@given(text=texts | st.text(max_size=30), cut=st.integers(0, 200), start=st.integers(0, 50), length=st.integers(1, 4))
def test_thousands_of_cuts(tokenizers, kind, text, cut, start, length):
    text = with_known_characters(kind, text)
    if text:
        check_cut(tokenizers[kind], text, cut)
        check_stop(tokenizers[kind], text, cut, start, length)
