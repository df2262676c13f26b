"""A `tokenizer.model` file with the tokens that were added to it, which sentencepiece itself knows nothing of."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from jaxpaged.text.added_tokens import AddedToken, TokenizerSettings
from jaxpaged.text.stream import check_text

#: Behind a serialised model, which protobuf merges into it: no space before the text, none taken away at its start.
NO_PREFIX = b"\x1a\x04\x18\x00\x20\x00"  # normalizer_spec {add_dummy_prefix: false, remove_extra_whitespaces: false}


class SentencePieceTokenizer:
    """Encodes and decodes as transformers 5 does with the same files.

    A space goes before a text, which decoding takes away again. Text behind an added token gets none, unless the files
    say `legacy`: then every part of a text gets one, as in transformers 4, and decoding leaves it there.
    """

    def __init__(self, path: Path, settings: TokenizerSettings):
        model = path.read_bytes()
        self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._inner = sentencepiece.SentencePieceProcessor(model_proto=model + NO_PREFIX)
        self._added = dict(settings.added)
        for content, token in settings.special.items():
            if (token_id := self._id_of(content)) is not None:
                self._added.setdefault(token_id, token)
        self._ids = {token.content: token_id for token_id, token in reversed(self._added.items())}
        contents = sorted(map(re.escape, self._ids), key=len, reverse=True)  # the longest that stands at a place
        self._pattern = re.compile("|".join(contents)) if contents else None
        self._legacy = settings.legacy
        self._bos = self._end_token("bos_token", settings, self._model.bos_id())
        self._eos = self._end_token("eos_token", settings, self._model.eos_id())
        self._first = self._bos if settings.add_bos else []
        self._last = self._eos if settings.add_eos else []

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        check_text(text)
        ids, start = [], 0
        for start_of_token, end, token_id in self._tokens_in(text):
            ids += [*self._encode_part(text[start:start_of_token], start == 0), token_id]
            start = end
        ids += self._encode_part(text[start:], start == 0)
        return [*self._first, *ids, *self._last] if add_special_tokens else ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text, is_start = "", True
        ids = [i for i in token_ids if not (skip_special_tokens and self._is_special(i))]
        for is_run, group in itertools.groupby(ids, lambda i: self._content(i) is None):
            for part in [list(group)] if is_run else ([i] for i in group):
                if is_run:  # ids beyond the table are padding of the embedding
                    model = self._model if is_start else self._inner
                    text += model.decode([i for i in part if i < self._model.get_piece_size()])
                else:
                    text += self._content(part[0]) or ""
                is_start = part == self._bos
        return text

    def bytes_of(self, token_id: int) -> bytes:
        """What the token adds behind others; empty for special tokens and ids without a token."""
        if self._is_special(token_id):
            return b""
        if (token := self._added.get(token_id)) is not None:
            return token.content.encode()
        if token_id >= self._model.get_piece_size() or self._model.is_unknown(token_id):
            return b""
        piece = self._model.id_to_piece(token_id)
        return bytes([int(piece[3:5], 16)]) if self._model.is_byte(token_id) else piece.replace("▁", " ").encode()

    def _id_of(self, content: str) -> int | None:
        """The id of one of the file's own pieces."""
        token_id = self._model.piece_to_id(content)
        return token_id if self._model.id_to_piece(token_id) == content else None

    def _end_token(self, name: str, settings: TokenizerSettings, own: int) -> list[int]:
        if name not in settings.names:
            return [own] if own >= 0 else []
        content = settings.names[name]
        token_id = None if content is None else self._ids.get(content, self._id_of(content))
        return [] if token_id is None else [token_id]

    def _tokens_in(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Where the added tokens of a text stand, with the blanks that they take, and their ids."""
        if self._pattern is None:
            return
        start = 0
        for found in self._pattern.finditer(text):
            token_id = self._ids[found[0]]
            token = self._added[token_id]
            begin, end = found.span()
            if begin < start or (token.single_word and _is_inside_word(text, begin, end)):
                continue
            if token.lstrip:
                begin = start + len(text[start:begin].rstrip())
            if token.rstrip:
                end = len(text) - len(text[end:].lstrip())
            yield begin, end, token_id
            start = end

    def _encode_part(self, text: str, is_first: bool) -> list[int]:
        if not text:
            return []
        return (self._model if is_first or self._legacy else self._inner).encode(text)

    def _content(self, token_id: int) -> str | None:
        """The text of a token that is written as it is; None for pieces that sentencepiece writes."""
        if (token := self._added.get(token_id)) is not None:
            return token.content
        is_control = token_id < self._model.get_piece_size() and self._model.is_control(token_id)
        return self._model.id_to_piece(token_id) if is_control else None

    def _is_special(self, token_id: int) -> bool:
        token: AddedToken | None = self._added.get(token_id)
        if token is not None:
            return token.special
        return token_id < self._model.get_piece_size() and self._model.is_control(token_id)


def _is_inside_word(text: str, begin: int, end: int) -> bool:
    return bool(re.match(r"\w", text[max(0, begin - 1) : begin]) or re.match(r"\w", text[end : end + 1]))
