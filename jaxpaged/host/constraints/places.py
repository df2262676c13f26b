"""Where samples and beams stand in what limits them: what the scheduler asks of it, whichever kind it is."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class SamplePlace(Protocol):
    """One sample's place. State: its tokens so far."""

    def push(self, token_id: int) -> None:
        """Take one more token, which was allowed."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether the output is complete, and nothing can follow."""
        ...


class BeamPlaces(Protocol):
    """The places of the running beams of one search."""

    def ends(self, parents: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """bool[C]: whether candidates, allowed tokens i32[C] behind beams i32[C], are complete and cannot go on."""
        ...

    def advance(self, parents: np.ndarray, tokens: np.ndarray) -> None:
        """The next beams: each of W continues one of the last by a token."""
        ...


class RequestLimit(Protocol):
    """What limits one request."""

    def first_tokens(self, vocab_size: int) -> np.ndarray:
        """i[C]: what an output may begin with."""
        ...

    def begin(self) -> SamplePlace:
        """Of a sample without tokens."""
        ...

    def begin_beams(self, width: int) -> BeamPlaces: ...

    def is_complete(self, output_ids: list[int]) -> bool:
        """Whether nothing can follow these tokens, which it allowed."""
        ...
