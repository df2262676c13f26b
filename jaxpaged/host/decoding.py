"""Sequences that decode: room for one more token of each, and how a group gives way where there is none for all."""

from __future__ import annotations

from jaxpaged.host.pages.block_table import PageCopy
from jaxpaged.host.pages.known_pages import KnownPages
from jaxpaged.host.pages.page_allocator import PageAllocator
from jaxpaged.host.pages.swap import Swap, SwapSpace
from jaxpaged.host.sequence import SequenceGroup, SequenceStatus
from jaxpaged.host.step.step_plan import Sample, StepPlan
from jaxpaged.host.systems.roles import Memory


def place_tokens(samples: list[Sample], policy: Memory) -> tuple[list[int], list[PageCopy]]:
    """A slot for the last token of each sequence, which the next step computes: where these stand, and what must be
    copied before they are written. OutOfPagesError, with nothing changed, where there is no room for all."""
    copies = policy.append([sample.sequence.table for sample in samples], [1] * len(samples))
    starts = [sequence.num_computed for _, sequence, _ in samples]
    for _, sequence, _ in samples:
        sequence.num_computed = computed = sequence.num_computed + 1
        if sequence.num_once_computed < computed:
            sequence.num_once_computed = computed
    if copies:
        copied_pages = {copy.dst for copy in copies}
        for group, sequence, _ in samples:
            if sequence.table.pages[-1] in copied_pages:
                group.pages.copied += 1
    return starts, copies


def give_way(
    group: SequenceGroup, plan: StepPlan, policy: Memory, swap_space: SwapSpace, known: KnownPages, page_size: int
) -> list[Swap]:
    """Take all pages from a group, for the others. It is swapped out, by what is returned, or computed again, as far as
    its pages are not found when it comes back."""
    swaps: list[Swap] = []
    group.record_pages()
    for sequence in group.unfinished:
        known.add_generated(group, sequence)
    wants_swap = swap_space.wants(group, page_size)
    if wants_swap and swap_space.has_room_for(group):
        allocator = policy.allocator
        assert isinstance(allocator, PageAllocator), "who reserved everything never gives way"
        swaps.append(swap_space.take_out(group, allocator))
        group.num_swaps += 1
        for sequence in group.unfinished:
            sequence.status = SequenceStatus.SWAPPED
    else:
        plan.num_swap_overflows += wants_swap
        for sequence in reversed(group.unfinished):
            policy.release(sequence.table)
            sequence.num_computed = 0
            sequence.status = SequenceStatus.WAITING
    plan.num_preempted += 1
    group.num_preemptions += 1
    return swaps
