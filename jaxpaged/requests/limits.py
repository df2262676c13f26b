"""From a request's constraint to what limits its samples and beams; ValueError for one that no output could satisfy."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from jaxpaged.api.constraint import Constraint, TrieFile
from jaxpaged.api.request_params import RequestParams
from jaxpaged.api.trie import Trie
from jaxpaged.api.values import is_list, shortened
from jaxpaged.host.constraints.in_text import TextLimit
from jaxpaged.host.constraints.in_trie import TrieLimit
from jaxpaged.host.constraints.places import RequestLimit
from jaxpaged.text.matching import Matchers, check_installed, fill_masks
from jaxpaged.text.tokenizer import Tokenizer, need_tokenizer

#: Files of items that are kept as they were read, and how many bytes one may have.
MAX_FILES, MAX_FILE_BYTES = 4, 1 << 32


class LimitReader:
    """Reads the constraints of one LLM. State: what was read of files, and the matchers of its tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None, missing: str):
        self._tokenizer = tokenizer
        self._missing = missing
        self._files = WeakValueDictionary[tuple[str, int, int], Trie]()  # all that somebody has
        self._latest = deque[Trie](maxlen=MAX_FILES)
        self._matchers: dict[int, Matchers] = {}  # by the size of the vocabulary

    def read(self, params: RequestParams, ends: frozenset[int], vocab_size: int, room: int) -> RequestLimit | None:
        """`ends`: tokens that end the request; `room`: tokens that an output may have."""
        constraint = params.constraint
        if constraint is None:
            return None
        if isinstance(constraint, TrieFile):
            constraint = self._trie_in(Path(constraint.path))
        if isinstance(constraint, Trie):
            constraint.check_tokens(vocab_size)
            constraint.check_lengths(room)
            return TrieLimit(constraint.with_ends(ends, params.min_tokens))
        assert isinstance(constraint, Constraint), f"params took {constraint!r} for a constraint"
        check_installed()
        tokenizer = need_tokenizer(self._tokenizer, "a constraint on text needs", self._missing)
        if vocab_size not in self._matchers:
            self._matchers[vocab_size] = Matchers(tokenizer, vocab_size)
        return TextLimit(self._matchers[vocab_size].make(constraint, ends), fill_masks)

    def _trie_in(self, path: Path) -> Trie:
        """The items of a file, read once as long as it stays the same."""
        if not path.is_file():
            raise ValueError(f"trie: {path} is no file")
        stat = path.stat()
        key = str(path), stat.st_mtime_ns, stat.st_size
        found = self._files.get(key)
        if found is None:
            found = self._files[key] = self._read_items(path)
        if found not in self._latest:
            self._latest.append(found)
        return found

    def _read_items(self, path: Path) -> Trie:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"trie: {path} has more than {MAX_FILE_BYTES} bytes: make a Trie of arrays")
        items = []
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            if line.strip():
                try:
                    items.append(self._item(json.loads(line)))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"trie: {path} line {number}: {error}") from None
        try:
            return Trie.from_sequences(items)
        except ValueError as error:
            raise ValueError(f"trie: {path}: {error}") from None

    def _item(self, value: Any) -> list[int]:
        """Token ids, or text, as they are or as the value of "token_ids" or "text"."""
        if isinstance(value, dict):
            value = value.get("token_ids", value.get("text"))
        if isinstance(value, str):
            tokenizer = need_tokenizer(self._tokenizer, "an item of text needs", self._missing)
            return tokenizer.encode(value, add_special_tokens=False)
        if not is_list(value):
            raise ValueError(
                f'a line must be a list of token ids, text, {{"token_ids": ...}} or {{"text": ...}}, got '
                f"{shortened(value)}"
            )
        return list(value)
