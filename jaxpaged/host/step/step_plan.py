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
    """One step: all of it prefill (several tokens a row) or all of it decode (one token a row)."""

    is_prefill: bool
    rows: list[PlanRow] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    # To be carried out in this order before the step writes: swaps, then copies. What is taken out may be overwritten.
    swaps: list[Swap] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
    num_preempted: int = 0
    num_swap_overflows: int = 0  # of those preempted, the ones that swap space had no room for
    num_recomputed: int = 0  # of the rows' tokens, those that were computed before
    is_foreseen: bool = False  # what is known of the step without its tokens has been taken (`Scheduler.foresee`)
    leaving: list[SequenceGroup] = field(default_factory=list)  # as was seen then: this step's tokens are their last
    num_trimmed: int = 0  # samples that, as it turned out, had ended one step before
    num_idle_rows: int = 0  # rows behind these, whose sequences have ended while their batch goes on
