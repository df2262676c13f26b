"""sentencepiece and tokenizers behind one small class, with the files that belong to them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import tokenizers

from jaxpaged.text.added_tokens import read_settings
from jaxpaged.text.sentencepiece_tokenizer import SentencePieceTokenizer
from jaxpaged.text.stream import REPLACEMENT, StopStringStream, check_text, decode_continuation, find_stop
from jaxpaged.text.token_bytes import byte_characters

#: What sentencepiece writes for a space, also in files of the other library.
SPACE = "▁"

__all__ = [
    "JsonTokenizer",
    "SentencePieceTokenizer",
    "StopStringStream",
    "Tokenizer",
    "decode_continuation",
    "encode_continuation",
    "find_stop",
    "find_tokenizer",
    "load_tokenizer",
    "need_tokenizer",
]


class Tokenizer(Protocol):
    """What jaxpaged needs of a tokenizer; pass your own object with these methods as `LLM(tokenizer=...)`."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class JsonTokenizer:
    """A `tokenizer.json` file of Hugging Face's tokenizers library."""

    def __init__(self, path: Path):
        self._model = tokenizers.Tokenizer.from_file(str(path))
        self._model.no_truncation()  # some files bring the settings of their training
        self._model.no_padding()
        self._bytes = _byte_tokens(self._model)
        self._added = self._model.get_added_tokens_decoder()
        self._special = {i for i, token in self._added.items() if token.special}
        self._is_of_bytes = self._model.decoder is not None and self._model.decoder.decode(["aĠa"]) == "a a"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        check_text(text)
        return self._model.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        ids = list(token_ids)
        text = self._model.decode(ids, skip_special_tokens=skip_special_tokens)
        if REPLACEMENT not in text or self._bytes.keys().isdisjoint(ids):
            return text
        return self._decode_broken_bytes([i for i in ids if not (skip_special_tokens and i in self._special)])

    def bytes_of(self, token_id: int) -> bytes | None:
        """What the token adds behind others; empty for special tokens, and None where only decoding could tell."""
        piece = self._model.id_to_token(token_id)
        if piece is None or token_id in self._special:
            return b""
        if token_id in self._added:
            return piece.encode()
        if self._is_of_bytes:
            known = byte_characters()
            return bytes(known[character] for character in piece) if known.keys() >= set(piece) else b""
        if token_id in self._bytes:
            return bytes([self._bytes[token_id]])
        return piece.replace(SPACE, " ").encode() if self._bytes else None

    def _decode_broken_bytes(self, ids: list[int]) -> str:
        """As the library, but for a run of byte tokens with an error in it, of which that makes nothing but U+FFFD.

        Its complete characters stay, so a text does not change where one more byte comes.
        """
        pieces: list[str] = []
        for is_byte, run in itertools.groupby(ids, lambda i: i in self._bytes):
            if is_byte:
                pieces += _decode_bytes(bytes(self._bytes[i] for i in run))
            else:
                pieces += [piece for i in run if (piece := self._model.id_to_token(i)) is not None]
        return self._model.decoder.decode(pieces)


def _byte_tokens(model: tokenizers.Tokenizer) -> dict[int, int]:
    """Ids of the tokens that stand for one byte each -> the byte; empty where the decoder does not join them."""
    if model.decoder is None or model.decoder.decode(["<0x41>"]) != "A":
        return {}
    ids = {model.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
    return {token_id: byte for token_id, byte in ids.items() if token_id is not None}


def _decode_bytes(data: bytes) -> list[str]:
    """The characters of UTF-8 with a U+FFFD for each byte that is part of none."""
    text = data.decode("utf-8", "surrogateescape")
    return [REPLACEMENT if "\udc80" <= character <= "\udcff" else character for character in text]


def find_tokenizer(given: str | Path | Tokenizer | None, found: Path | None) -> Tokenizer | None:
    """What the user gave, a path or an object, or else the file that was `found` with the model, if any."""
    if isinstance(given, str | Path):
        return load_tokenizer(given)
    if given is not None:
        if not (hasattr(given, "encode") and hasattr(given, "decode")):
            raise ValueError(f"tokenizer must be a path or have encode and decode, got {type(given).__name__}")
        return given
    return None if found is None else load_tokenizer(found)


def need_tokenizer(tokenizer: Tokenizer | None, what: str, missing: str) -> Tokenizer:
    """The tokenizer, or ValueError where there is none: what it is needed for ("text needs"), and what is missing."""
    if tokenizer is None:
        raise ValueError(f"{what} a tokenizer, and {missing}: give token ids, or name a tokenizer")
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """From a `tokenizer.json` or `tokenizer.model` file, or a directory that holds one."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"no tokenizer.json and no tokenizer.model in {path}")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer {path} does not exist")
    settings = read_settings(path.parent) if path.suffix != ".json" else None
    try:
        if settings is None:
            return JsonTokenizer(path)
        return SentencePieceTokenizer(path, settings)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a sentencepiece model: {error}") from None
    except Exception as error:  # the tokenizers library raises bare Exception for every malformed file
        if type(error) is not Exception:
            raise
        raise ValueError(f"{path} is not a tokenizers file: {error}") from None


def encode_continuation(tokenizer: Tokenizer, prompt_ids: Sequence[int], text: str) -> list[int]:
    """Token ids that add exactly `text` to the prompt; ValueError where none are found.

    Encoded alone, many tokenizers put a space before it; encoded with the prompt, it may merge with the last token.
    """
    whole = tokenizer.decode(prompt_ids) + text
    found = [tokenizer.encode(whole), tokenizer.encode(whole, add_special_tokens=False)]
    found = [ids[len(prompt_ids) :] for ids in found if ids[: len(prompt_ids)] == list(prompt_ids)]
    for ids in (*found, tokenizer.encode(text, add_special_tokens=False)):
        if ids and decode_continuation(tokenizer, prompt_ids, ids) == text:
            return ids
    raise ValueError(f"no token ids were found that add just {text!r} to a text with this end: give token ids")
