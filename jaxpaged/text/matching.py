"""Regular expressions, JSON schemas and grammars over a tokenizer, by llguidance (the extra `guided`).

The library gets the bytes of every token, and an end token of its own behind the vocabulary, so what it says of a text
is not mixed with how a request may end: where the text may end, the tokens that end the request are added.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxpaged.api.constraint import Constraint, Grammar, JsonSchema, Regex
from jaxpaged.text.token_bytes import token_bytes
from jaxpaged.text.tokenizer import Tokenizer

#: Constraints whose reading is kept: many requests have the same one.
MAX_KEPT = 64
#: JSON is written without blanks between its parts: a model that likes them could write them for ever.
JSON_OPTIONS = {"whitespace_flexible": False}
#: Where only one text may follow, every token that begins it is allowed, not just those the tokenizer would make of it.
OPTIONS = '%llguidance {"no_forcing": true}'


class Matchers:
    """Makes matchers for one tokenizer and vocabulary, and keeps what was read of the latest constraints."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        from llguidance import LLExecutor, LLTokenizer

        table: Any = _TokenTable(tokenizer, vocab_size)
        self._tokenizer = LLTokenizer(table)
        self._vocab_size = vocab_size
        self._executor = LLExecutor()
        self._kept: dict[Constraint, Any] = {}  # matchers at the beginning, from which others are copied

    def make(self, constraint: Constraint, ends: Iterable[int]) -> Matcher:
        """At the beginning of a text; ValueError where the library does not take the constraint."""
        if constraint not in self._kept:
            if len(self._kept) == MAX_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[constraint] = self._read(constraint)
        return Matcher(self._kept[constraint].deep_copy(), self._executor, self._vocab_size, sorted(ends))

    def _read(self, constraint: Constraint) -> Any:
        from llguidance import LLMatcher

        grammar = _grammar_of(constraint)
        is_wrong, reasons = LLMatcher.validate_grammar_with_warnings(grammar, self._tokenizer)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if is_wrong or matcher.is_error():
            raise ValueError(_refusal(constraint, matcher.get_error() or reasons[0]))
        return matcher


def _refusal(constraint: Constraint, reason: str) -> str:
    """With a message of the library, but for its listing of the grammar, in which the place is marked."""
    kind = next(iter(constraint.as_json()))
    lines = [line for line in reason.splitlines() if not re.match(r"\s*(\d+ \||\^\s*$)", line)]
    return f"constraint: llguidance cannot follow this {kind}: {' '.join(' '.join(lines).split())}"


class Matcher:
    """Where one output stands in what it is to match."""

    def __init__(self, matcher: Any, executor: Any, vocab_size: int, ends: list[int]):
        self._matcher, self._executor = matcher, executor
        self._vocab_size, self._ends = vocab_size, ends
        self._has_ended = False  # by an end token, behind which nothing comes

    def copy(self) -> Matcher:
        other = Matcher(self._matcher.deep_copy(), self._executor, self._vocab_size, self._ends)
        other._has_ended = self._has_ended
        return other

    @property
    def is_over(self) -> bool:
        """Whether the text is complete, and nothing could go on from it."""
        return self._matcher.is_stopped() and self._matcher.is_accepting()

    def push(self, token_id: int) -> None:
        """One more token, which was allowed."""
        if not self._matcher.try_consume_tokens([token_id]):
            self._has_ended = True

    def is_over_behind(self, token_id: int) -> bool:
        """What `is_over` would be behind one more token."""
        if self._matcher.is_stopped() or not self._matcher.try_consume_tokens([token_id]):
            return False
        is_over = self.is_over
        self._matcher.rollback(1)
        return is_over

    def add_ends(self, words: np.ndarray) -> None:
        """Allow what ends a request, in the bits i32[W] of the vocabulary, where the text may end here."""
        if self._matcher.is_accepting() and not self._has_ended:
            for token_id in self._ends:
                words[token_id >> 5] |= np.array(1 << (token_id & 31), np.uint32).view(np.int32)


def fill_masks(matchers: Sequence[tuple[int, Matcher]], words: np.ndarray) -> None:
    """The bits of the tokens that may come next: i32[R, W], the row of each matcher; other rows stay as they are."""
    rows: dict[Matcher, list[int]] = {}  # one may stand in several rows, and is asked once
    for row, matcher in matchers:
        rows.setdefault(matcher, []).append(row)
    asked = list(rows)
    vocab_size = asked[0]._vocab_size
    found = np.zeros((len(asked), vocab_size // 32 + 1), np.int32)  # with a bit for the library's own end token
    going = [(one._matcher, i) for i, one in enumerate(asked) if not (one._has_ended or one._matcher.is_stopped())]
    if going:
        asked[0]._executor.unsafe_compute_mask_ptr(going, found.ctypes.data, 4 * found.shape[1], len(found))
    found = _without_end(found[:, : words.shape[1]], vocab_size)
    for matcher, bits in zip(asked, found, strict=True):
        matcher.add_ends(bits)
        words[rows[matcher]] = bits


def _without_end(words: np.ndarray, vocab_size: int) -> np.ndarray:
    """The same without the bit behind the vocabulary, of the library's own end token."""
    if vocab_size % 32:
        words[:, -1] &= np.int32((1 << vocab_size % 32) - 1)
    return words


def check_constraint(constraint: Constraint) -> None:
    """ValueError where the library is missing, or does not take a constraint whatever the tokenizer."""
    check_installed()
    from llguidance import LLMatcher

    is_wrong, reasons = LLMatcher.validate_grammar_with_warnings(_grammar_of(constraint))
    if is_wrong:
        raise ValueError(_refusal(constraint, reasons[0]))


def check_installed() -> None:
    if importlib.util.find_spec("llguidance") is None:
        raise ValueError(
            "constraint: regular expressions, JSON schemas and grammars are followed by llguidance, which is not "
            "installed: pip install 'jaxpaged[guided]'"
        )


class _TokenTable:
    """What llguidance asks of a tokenizer."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        known = token_bytes(tokenizer, vocab_size)
        # An empty token is none that a text could have; as special tokens they need a name, and no two the same.
        self.tokens = [each or f"<{token_id}>".encode() for token_id, each in enumerate(known)] + [b"<end>"]
        self.special_token_ids = [token_id for token_id, each in enumerate(known) if not each] + [vocab_size]
        self.eos_token_id, self.bos_token_id = vocab_size, None
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self._tokenizer.encode(text, add_special_tokens=False)


def _grammar_of(constraint: Constraint) -> str:
    """In the library's form of Lark."""
    from llguidance import LLMatcher

    if isinstance(constraint, Regex):
        lark = json.loads(LLMatcher.grammar_from_regex(constraint.pattern))["grammars"][0]["lark_grammar"]
    elif isinstance(constraint, JsonSchema):
        schema = json.loads(constraint.schema)
        own = schema.get("x-guidance")
        schema["x-guidance"] = JSON_OPTIONS | (own if isinstance(own, dict) else {})
        lark = f"start: %json {json.dumps(schema)}"
    else:
        assert isinstance(constraint, Grammar), f"{constraint} is not followed by matchers"
        lark = constraint.text
    return LLMatcher.grammar_from_lark(f"{lark}\n{OPTIONS}")
