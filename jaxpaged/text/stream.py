"""Text that grows with its tokens: the piece that each token adds, and the stop strings that tokens complete.

A token may end inside a character, and decoders write the first token of a text in a way of its own (without its
space). So no token is decoded alone but behind some that came before it, and text is given only up to the end of its
last complete character; the rest waits for the tokens that complete it.

A character that the prompt begins and the continuation completes belongs to the continuation, as a whole. Bytes that
never become a character are U+FFFD, as often as the decoder writes it: the prompt's are part of the prompt's text, the
continuation's of the continuation's. (A U+FFFD that is itself spelt as bytes is the prompt's where that began it.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

#: Tokens that a continuation is decoded behind, so that it begins with its own leading space.
CONTEXT_TOKENS = 8
#: What decoders write for bytes that are no character, or not yet.
REPLACEMENT = "\ufffd"
#: A character has four bytes at most: so many tokens hold what is missing of one, and a window begins so much earlier.
MISSING_TOKENS = 3
#: Tokens that may wait for the end of a character; a cut between two characters is looked for behind so many.
MAX_WAITING = 12

Decode = Callable[[Sequence[int], bool], str]  # token ids, skip_special_tokens


class Decoder(Protocol):
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


def check_text(text: str) -> None:
    """ValueError for half of a surrogate pair, which JSON can spell and no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        character = text[error.start]
        raise ValueError(
            f"the text has a lone surrogate, {character!r} at character {error.start + 1}: it is not Unicode text"
        ) from None


class TextStream:
    """What tokens add to the text of a prompt, piece by piece; the pieces and `rest` join to the continuation."""

    def __init__(self, decode: Decode, prompt_ids: Sequence[int], skip_special_tokens: bool = True):
        self._decode_ids = decode
        self._skip_special_tokens = skip_special_tokens
        start, end = self._find_context(prompt_ids)
        self._context = list(prompt_ids[start:end])  # its text has been given
        self._pieces = [len(self._context)]  # tokens of the context, by the pushes that they came with
        self._before = self._decode(self._context)
        self._silent: list[int] = []  # tokens behind the context that add no text to it, but may to what comes
        self._waiting = list(prompt_ids[end:])  # behind the context, up to the end of a character
        self._num_given = 0  # characters of their text that have been given
        self._prompts = self._added(self._waiting)  # text that they have without the continuation

    def push(self, token_id: int) -> str:
        """Take one more token; the piece of text that it completes, which may be empty."""
        self._waiting.append(token_id)
        added = self._added(self._waiting)
        piece = self._give(_complete(added))
        if not added.endswith(REPLACEMENT):
            self._take_over(self._waiting, added)
            self._waiting = []
        elif len(self._waiting) > MAX_WAITING:
            piece += self._cut(added)
        return piece

    def peek(self, token_id: int) -> str:
        """The piece that `push` would give."""
        return self._ungiven(_complete(self._added([*self._waiting, token_id])))

    def peek_all(self, token_ids: Sequence[int]) -> str | None:
        """The pieces of many tokens, joined; None where that takes a `push` of each."""
        whole = self._decode([*self._context, *self._silent, *self._waiting, *token_ids])
        if not whole.startswith(self._before) or REPLACEMENT in whole[len(self._before) :]:
            return None
        return self._ungiven(whole[len(self._before) :])

    def rest(self) -> str:
        """What the tokens that wait are written as, if no other comes: U+FFFD for an incomplete character."""
        return self._ungiven(self._added(self._waiting))

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._decode_ids(token_ids, self._skip_special_tokens) if token_ids else ""

    def _find_context(self, ids: Sequence[int]) -> tuple[int, int]:
        """Start and end of the prompt's last tokens that begin and end between two characters and have a text."""
        for end in range(len(ids), max(0, len(ids) - 2 * MISSING_TOKENS) - 1, -1):
            for start in _starts(end):
                text = self._decode(ids[start:end])
                if not (text.startswith(REPLACEMENT) or text.endswith(REPLACEMENT)) and (text or start == 0):
                    return start, end
        return max(0, len(ids) - CONTEXT_TOKENS), len(ids)  # U+FFFD itself, many times

    def _added(self, token_ids: Sequence[int]) -> str:
        """The text that tokens add to the context's."""
        whole = self._decode([*self._context, *self._silent, *token_ids])
        if whole.startswith(self._before):
            return whole[len(self._before) :]
        if self._before.endswith(REPLACEMENT):
            return whole[_common(self._before, whole) :]
        return self._decode(token_ids)  # a decoder that writes earlier characters as U+FFFD for a later byte's sake

    def _ungiven(self, added: str) -> str:
        return added[max(self._num_given, _common(self._prompts, added)) :]

    def _give(self, added: str) -> str:
        piece = self._ungiven(added)
        self._num_given = max(self._num_given, len(added))
        return piece

    def _take_over(self, token_ids: list[int], added: str) -> None:
        """Make tokens, whose text has been given, context: no more of it is kept than has a text of its own.

        Tokens without a text are kept too, as far as a decoder may look back: it may write one that comes by them (two
        spaces behind a BOS token that is written, of which sentencepiece leaves the first out).
        """
        self._num_given, self._prompts = max(0, self._num_given - len(added)), ""
        if not added and self._before:
            self._silent = [*self._silent, *token_ids][-MAX_WAITING:]
            return
        self._context += [*self._silent, *token_ids]
        self._pieces.append(len(self._silent) + len(token_ids))
        self._silent = []
        before = None
        while len(self._pieces) > 1 and (shorter := self._decode(self._context[self._pieces[0] :])):
            del self._context[: self._pieces.pop(0)]
            before = shorter
        self._before = self._decode(self._context) if before is None else before

    def _cut(self, added: str) -> str:
        """Give up the oldest tokens that wait, where they end between two characters: they will never be one."""
        old, new = self._waiting[: -MISSING_TOKENS - 1], self._waiting[-MISSING_TOKENS - 1 :]
        text = self._added(old)
        if text + self._decode(new) != added:
            return ""
        piece = self._give(text)
        self._take_over(old, text)
        self._waiting = new
        return piece


def _starts(end: int) -> Iterator[int]:
    """Where a context of the tokens before `end` may start: first near, and none of them skipped by a character."""
    size = CONTEXT_TOKENS
    while True:
        for more in range(MISSING_TOKENS + 1):
            yield max(0, end - size - more)
            if end - size - more <= 0:
                return
        size *= 2


def _complete(text: str) -> str:
    return text.rstrip(REPLACEMENT)


def _common(first: str, second: str) -> int:
    """Characters that two texts have in common at their start."""
    return len(os.path.commonprefix((first, second)))


def text_pieces(
    decode: Decode, before_ids: Sequence[int], token_ids: Sequence[int], skip_special_tokens: bool = True
) -> list[str]:
    """What each token adds to the text of those before it; an incomplete character at the end goes with the last."""
    stream = TextStream(decode, before_ids, skip_special_tokens)
    pieces = [stream.push(token_id) for token_id in token_ids]
    if pieces:
        pieces[-1] += stream.rest()
    return pieces


def decode_continuation(
    tokenizer: Decoder,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    skip_special_tokens: bool = True,
    is_finished: bool = True,
) -> str:
    """The text that `output_ids` add to the prompt's: what a `TextStream` gives, in fewer decodings.

    `is_finished`: no token comes behind them, so a character that they leave incomplete is written, as U+FFFD.
    """
    stream, text = TextStream(tokenizer.decode, prompt_ids, skip_special_tokens), ""
    for end in range(len(output_ids), max(0, len(output_ids) - MISSING_TOKENS - 1), -1):
        if (found := stream.peek_all(output_ids[:end])) is not None:
            if end == len(output_ids):
                return found
            stream = TextStream(tokenizer.decode, [*prompt_ids, *output_ids[:end]], skip_special_tokens)
            text, output_ids = found, output_ids[end:]
            break
    text += "".join([stream.push(token_id) for token_id in output_ids])
    return text + stream.rest() if is_finished else text


def find_stop(text: str, stops: Sequence[str], searched: int = 0) -> tuple[int, str] | None:
    """Where the earliest stop string begins that ends behind the first `searched` characters, and which it is."""
    found = [(text.find(stop, max(0, searched - len(stop) + 1)), stop) for stop in stops]
    return min(((at, stop) for at, stop in found if at >= 0), key=lambda place: place[0], default=None)


class StopStringStream:
    """Text of one sample as its tokens come, up to its last complete character, watched for stop strings."""

    def __init__(
        self,
        tokenizer: Decoder,
        prompt_ids: Sequence[int],
        stop: tuple[str, ...],
        include_stop: bool,
        skip_special_tokens: bool,
    ):
        self.text = ""
        self._stream = TextStream(tokenizer.decode, prompt_ids, skip_special_tokens)
        self._stop = stop
        self._include_stop = include_stop

    def push(self, token_id: int, *, may_stop: bool) -> str | None:
        """Take one more token; the stop string that its text completes, if `may_stop`. `text` then ends there."""
        searched = len(self.text)
        self.text += self._stream.push(token_id)
        return self._find_stop(searched) if may_stop and len(self.text) > searched else None

    def _find_stop(self, searched: int) -> str | None:
        """Earliest stop string that ends behind `searched` characters of the text."""
        found = find_stop(self.text, self._stop, searched)
        if found is None:
            return None
        at, stop = found
        self.text = self.text[: at + len(stop) if self._include_stop else at]
        return stop
