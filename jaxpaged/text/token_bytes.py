"""The bytes that each token of a vocabulary adds to a text, for who follows a text through its tokens.

Tokenizers of the two libraries know them (`bytes_of`); of any other object they are what its decoding shows.
"""

from __future__ import annotations

import functools
from typing import Any

from jaxpaged.text.stream import REPLACEMENT

#: Behind this text tokens are decoded, of a tokenizer that is not known: so they write a space that they begin with.
ANCHOR = "a"


def token_bytes(tokenizer: Any, vocab_size: int) -> list[bytes]:
    """Of every id; empty for special tokens, ids without a token, and what adds nothing."""
    bytes_of = getattr(tokenizer, "bytes_of", None)
    known = [] if bytes_of is None else [bytes_of(token_id) for token_id in range(vocab_size)]
    return known if known and None not in known else _decoded(tokenizer, vocab_size)


def _decoded(tokenizer: Any, vocab_size: int) -> list[bytes]:
    """By what is decoded behind other tokens. Of a part of a character nothing can be said: such tokens count as empty,
    and so does what cannot be decoded at all."""
    anchor = tokenizer.encode(ANCHOR, add_special_tokens=False)
    before = tokenizer.decode(anchor, skip_special_tokens=True)
    found = []
    for token_id in range(vocab_size):
        try:
            text = tokenizer.decode([*anchor, token_id], skip_special_tokens=True)
        except (IndexError, KeyError, ValueError, OverflowError):  # an id that the tokenizer does not have
            text = ""
        is_clear = text.startswith(before) and REPLACEMENT not in text
        found.append(text[len(before) :].encode() if is_clear else b"")
    return found


@functools.cache
def byte_characters() -> dict[str, int]:
    """The characters that stand for bytes in vocabularies of bytes (GPT-2's): printable ones for themselves."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
