"""What the scheduler hands on: which tokens a step computes, whose next tokens it chooses, and what moves before it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxpaged.host.pages.block_table import PageCopy
from jaxpaged.host.pages.swap import Swap
from jaxpaged.host.sequence import Sequence, SequenceGroup

NO_COPIES = np.zeros((2, 0), np.int32)


class PlanRow(NamedTuple):
    """Compute the KV of `count` tokens of `sequence` from position `start` on."""

    group: SequenceGroup
    sequence: Sequence
    start: int
    count: int


class Sample(NamedTuple):
    """Choose the next token of `sequence` from the logits behind the last token of plan row `row`."""

    group: SequenceGroup
    sequence: Sequence
    row: int


class SearchRows(NamedTuple):
    """Compute the last token of every beam of a search whose beams are arrays, and choose the next beams."""

    group: SequenceGroup
    row: int  # of its first beam; the others follow
    width: int
    position: int  # of the token that each computes


@dataclass(slots=True)
class StepPlan:
    """One step: of prompts (several tokens a row), of sequences that decode (one token a row), or of both."""

    is_prefill: bool  # it computes prompts
    num_decoding: int = 0  # of such a step: its first rows, which decode, with as many first samples; else all do
    listed: list[PlanRow] = field(default_factory=list)  # rows, unless `starts` say them
    samples: list[Sample] = field(default_factory=list)
    searches: list[SearchRows] = field(default_factory=list)  # of a decode step: its rows behind those of samples
    starts: list[int] = field(default_factory=list)  # of a decode step: the token of each sample that it computes
    # To be carried out in this order before the step writes: swaps, then copies. What is taken out may be overwritten.
    swaps: list[Swap] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
    search_copies: np.ndarray = field(default_factory=lambda: NO_COPIES)  # i32[2, C] of searches, where these are known
    num_preempted: int = 0
    num_swap_overflows: int = 0  # of those preempted, the ones that swap space had no room for
    num_recomputed: int = 0  # of the rows' tokens, those that were computed before
    leaving: list[SequenceGroup] = field(default_factory=list)  # as was foreseen: this step's tokens are their last
    num_trimmed: int = 0  # samples that, as it turned out, had ended one step before
    num_idle_rows: int = 0  # rows behind these, whose sequences have ended while their batch goes on

    @property
    def is_mixed(self) -> bool:
        return self.num_decoding > 0

    @property
    def num_rows(self) -> int:
        return (len(self.listed) or len(self.starts)) + self.num_beams

    @property
    def num_copies(self) -> int:
        return len(self.copies) + self.search_copies.shape[1]

    @property
    def num_beams(self) -> int:
        """Rows of `searches`."""
        return sum([search.width for search in self.searches])

    @property
    def num_choices(self) -> int:
        """Tokens that the step chooses."""
        return len(self.samples) + self.num_beams

    @property
    def rows(self) -> list[PlanRow]:
        """What is computed, but for the rows of `searches`. Of a decode step made at each call, since most do without
        (standing_batch.py)."""
        if not self.starts:
            return self.listed
        pairs = zip(self.samples, self.starts, strict=True)
        return [PlanRow(group, sequence, start, 1) for (group, sequence, _), start in pairs]
