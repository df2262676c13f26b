"""What the scheduler hands on: which tokens a step computes, whose next tokens it chooses, and what moves before it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from jaxpaged.host.pages.block_table import PageCopy
from jaxpaged.host.pages.swap import Swap
from jaxpaged.host.sequence import Sequence, SequenceGroup


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


@dataclass(slots=True)
class StepPlan:
    """One step: of prompts (several tokens a row), of sequences that decode (one token a row), or of both."""

    is_prefill: bool  # it computes prompts
    num_decoding: int = 0  # of such a step: its first rows, which decode, with as many first samples; else all do
    listed: list[PlanRow] = field(default_factory=list)  # rows, unless `starts` say them
    samples: list[Sample] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # of a decode step: the token of each sample that it computes
    # To be carried out in this order before the step writes: swaps, then copies. What is taken out may be overwritten.
    swaps: list[Swap] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
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
        return len(self.listed) or len(self.starts)

    @property
    def rows(self) -> list[PlanRow]:
        """What is computed. Of a decode step made at each call, since most do without (standing_batch.py)."""
        if not self.starts:
            return self.listed
        pairs = zip(self.samples, self.starts, strict=True)
        return [PlanRow(group, sequence, start, 1) for (group, sequence, _), start in pairs]
