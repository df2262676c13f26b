"""Samples and beams in a text that is to match something: a matcher each, whose tokens the host looks up (it is told
the tokens, so the steps of such a run are not planned ahead)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class TextMatcher(Protocol):
    """What text/matching.py makes."""

    @property
    def is_over(self) -> bool: ...

    def push(self, token_id: int) -> None: ...

    def copy(self) -> TextMatcher: ...

    def is_over_behind(self, token_id: int) -> bool: ...


#: Writes the bits of the tokens that matchers allow next to their rows of an array i32[R, V / 32].
FillMasks = Callable[[Sequence[tuple[int, Any]], np.ndarray], None]


class TextPlace:
    """One sample's matcher."""

    def __init__(self, matcher: TextMatcher, fill_masks: FillMasks):
        self.matcher, self.fill_masks = matcher, fill_masks

    def push(self, token_id: int) -> None:
        self.matcher.push(token_id)

    @property
    def is_over(self) -> bool:
        return self.matcher.is_over


class TextBeams:
    """The matchers of a search's beams. A beam that goes on once keeps its own; for further children it is copied."""

    def __init__(self, matcher: TextMatcher, width: int, fill_masks: FillMasks):
        self.matchers, self.fill_masks = [matcher] * width, fill_masks

    def ends(self, parents: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        pairs = zip(parents.tolist(), tokens.tolist(), strict=True)
        return np.array([self.matchers[beam].is_over_behind(token) for beam, token in pairs], bool)

    def advance(self, parents: np.ndarray, tokens: np.ndarray) -> None:
        # What is behind a beam and a token is the same wherever they come up: in places without a beam they do again.
        pairs = list(zip(parents.tolist(), tokens.tolist(), strict=True))
        last = {self.matchers[beam]: (beam, token) for beam, token in pairs}
        children: dict[tuple[int, int], TextMatcher] = {}
        for pair in dict.fromkeys(pairs):
            parent = self.matchers[pair[0]]
            children[pair] = parent if last[parent] == pair else parent.copy()
        for (_, token), child in children.items():  # when all copies have been made
            child.push(token)
        self.matchers = [children[pair] for pair in pairs]


@dataclass(frozen=True, eq=False)
class TextLimit:
    """What a request's text is to match: a matcher at its beginning, which is only copied."""

    matcher: TextMatcher
    fill_masks: FillMasks

    def first_tokens(self, vocab_size: int) -> np.ndarray:
        words = np.zeros((1, -(-vocab_size // 32)), np.int32)
        self.fill_masks([(0, self.matcher.copy())], words)
        return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))

    def begin(self) -> TextPlace:
        return TextPlace(self.matcher.copy(), self.fill_masks)

    def begin_beams(self, width: int) -> TextBeams:
        return TextBeams(self.matcher.copy(), width, self.fill_masks)

    def is_complete(self, output_ids: list[int]) -> bool:
        place = self.begin()
        for token_id in output_ids:
            place.push(token_id)
        return place.is_over
