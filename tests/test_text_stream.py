"""Whatever the tokenizer, pieces join to the decoded whole, from any cut of any text; and stop strings are found."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import save_all, texts
from tokenizers import Tokenizer

from jaxpaged.beam_params import BeamSearchParams
from jaxpaged.beam_text import BeamText
from jaxpaged.text_stream import StopStringStream, decode_continuation, text_pieces
from jaxpaged.tokenizer import load_tokenizer

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
    assert before + added == whole
    stream = StopStringStream(tokenizer, ids[:cut], ("never",), False, True)
    assert [stream.push(token_id, may_stop=True) for token_id in ids[cut:]] == [None] * len(pieces)
    assert stream.text == added


def check_stop(tokenizer, text, cut, start, length):
    """A stop string ends a sample and a beam with the token that completes it."""
    ids = tokenizer.encode(text)
    cut %= len(ids) + 1
    output = ids[cut:]
    added = decode_continuation(tokenizer, ids[:cut], output)
    stop = added[start % max(1, len(added)) :][:length]
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
    check_cut(tokenizers[kind], text, cut)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(text=texts, cut=st.integers(0, 200), start=st.integers(0, 50), length=st.integers(1, 4))
def test_stop_strings_are_found_where_they_are_complete(tokenizers, kind, text, cut, start, length):
    check_stop(tokenizers[kind], text, cut, start, length)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=600, deadline=None)
@given(text=texts | st.text(max_size=30), cut=st.integers(0, 200), start=st.integers(0, 50), length=st.integers(1, 4))
def test_thousands_of_cuts(tokenizers, kind, text, cut, start, length):
    if text:
        check_cut(tokenizers[kind], text, cut)
        check_stop(tokenizers[kind], text, cut, start, length)
