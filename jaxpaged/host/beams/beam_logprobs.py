"""Log-probabilities of single tokens of beams: what each step returned is kept, and read along the parents at the end.

A step that chooses among candidates knows each one's log-probability and rank under the model, and the likeliest tokens
of each row. A hypothesis names for each of its tokens the beam whose logits gave it, so its entries are found without
copying any when a beam forks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxpaged.host.beams.beam_state import BeamState, Hypothesis
from jaxpaged.host.step.logprob_entry import Entry, make_entry
from jaxpaged.step_io import GroupCandidates, RowCandidates, TokenLogprobs


class StepLogprobs(NamedTuple):
    """What one step said of the beams of one search. One row a beam; in the first step one for all."""

    parents: np.ndarray | None  # i32[C] of merged candidates; None: candidates are row by row
    tokens: np.ndarray  # i32[C] or i32[rows, k]
    logprobs: np.ndarray  # f32, as `tokens`
    ranks: np.ndarray  # i32, as `tokens`
    top_ids: np.ndarray  # i32[rows, n]
    top_logprobs: np.ndarray  # f32[rows, n]

    def entry(self, beam: int, token: int, count: int) -> Entry:
        """The token itself first, then the `count` likeliest (-1: all) after its beam."""
        row = min(beam, len(self.top_ids) - 1)
        if self.parents is None:
            places = self.tokens[row] == token
            logprobs, ranks = self.logprobs[row], self.ranks[row]
        else:
            places = (self.parents == beam) & (self.tokens == token)
            logprobs, ranks = self.logprobs, self.ranks
        place = int(places.argmax())
        assert places[place], f"token {token} was no candidate of beam {beam}"
        return make_entry(token, logprobs[place], ranks[place], self.top_ids[row], self.top_logprobs[row], count)


def keep_rows(state: BeamState, candidates: RowCandidates, likeliest: TokenLogprobs, first_row: int) -> None:
    """Keep what a step said of the rows from `first_row` on: one a running beam, or one for all before the first."""
    rows = slice(first_row, first_row + (state.width if state.num_generated else 1))
    assert candidates.logprobs is not None
    kept = StepLogprobs(
        None, candidates.tokens[rows], candidates.logprobs[rows], candidates.ranks[rows], *_likeliest(likeliest, rows)
    )
    state.logprobs.append(kept)


def keep_group(
    state: BeamState, candidates: GroupCandidates, likeliest: TokenLogprobs, group: int, first_row: int
) -> None:
    """The same of candidates that the device merged, of which `group` is this search's row."""
    rows = slice(first_row, first_row + state.width)
    assert candidates.logprobs is not None
    kept = StepLogprobs(
        candidates.parents[group], candidates.tokens[group], candidates.logprobs[group], candidates.ranks[group],
        *_likeliest(likeliest, rows),
    )  # fmt: skip
    state.logprobs.append(kept)


def _likeliest(logprobs: TokenLogprobs, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    assert logprobs.top_ids is not None and logprobs.top_logprobs is not None
    return logprobs.top_ids[rows], logprobs.top_logprobs[rows]


def logprobs_of(hypothesis: Hypothesis, steps: list[StepLogprobs], count: int) -> list[Entry]:
    """An entry for each token of a hypothesis of the search that kept `steps`."""
    choices = zip(steps, hypothesis.beams, hypothesis.token_ids, strict=False)  # the search may have gone on
    return [step.entry(beam, token, count) for step, beam, token in choices]
