"""Sequences that decode: room for one more token of each, and how a group gives way where there is none for all."""

from __future__ import annotations

import numpy as np

from jaxpaged.host.beams.gathering import spread
from jaxpaged.host.pages.block_table import PageCopy, num_pages_needed
from jaxpaged.host.pages.known_pages import KnownPages
from jaxpaged.host.pages.page_allocator import OutOfPagesError, PageAllocator
from jaxpaged.host.pages.swap import Swap, SwapSpace
from jaxpaged.host.pages.window import PageWindow
from jaxpaged.host.sequence import SequenceGroup, SequenceStatus
from jaxpaged.host.step.step_plan import NO_COPIES, Sample, SearchRows, StepPlan
from jaxpaged.host.systems.roles import Memory


def place_tokens(samples: list[Sample], policy: Memory) -> tuple[list[int], list[PageCopy]]:
    """A slot for the last token of each sequence, which the next step computes: where these stand, and what must be
    copied before they are written. OutOfPagesError, with nothing taken, where there is no room for all."""
    if policy.window is not None:
        _give_back(samples, policy.window)
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


def place_beams(searches: list[SearchRows], samples: list[Sample], policy: Memory) -> np.ndarray:
    """The same for searches whose beams are arrays: copies i32[2, C], of steps that are not planned ahead.
    OutOfPagesError, with nothing changed, where there is no room for these and the samples."""
    if not searches:
        return NO_COPIES
    tables, copies = [search.group.tables for search in searches], [NO_COPIES]
    allocator = policy.allocator
    needed = sum([one.num_needed() for one in tables if one is not None])
    if needed + 2 * len(samples) > allocator.num_free:
        assert isinstance(allocator, PageAllocator), "beams are gathered over pages alone"
        needed += num_pages_needed([one.sequence.table for one in samples], [1] * len(samples), allocator)
        if needed > allocator.num_free:
            raise OutOfPagesError(f"{needed} pages are needed, {allocator.num_free} are free")
    for group, _, _, position in searches:
        assert group.tables is not None, "this search has ended"
        is_ahead = group.tables.num_in_flight > 0
        group.tables.append()
        if not is_ahead:
            copies.append(group.tables.copies)
            group.pages.copied += group.tables.copies.shape[1]
        (prompt,) = group.sequences
        prompt.num_computed = prompt.num_once_computed = position + 1
    return np.concatenate(copies, axis=1)


def _give_back(samples: list[Sample], window: PageWindow) -> None:
    """Let go of what the tokens to come do not read; first, what their groups have held is taken down."""
    due = [(group, sequence.table) for group, sequence, _ in samples if window.gives_back(sequence.table)]
    for group in dict.fromkeys(group for group, _ in due):
        group.record_pages()
    for _, table in due:
        window.give_back(table, table.num_slots)


def give_way(
    group: SequenceGroup, plan: StepPlan, policy: Memory, swap_space: SwapSpace, known: KnownPages, page_size: int
) -> list[Swap]:
    """Take all pages from a group, for the others. It is swapped out, by what is returned, or computed again, as far as
    its pages are not found when it comes back."""
    swaps: list[Swap] = []
    group.record_pages()
    if group.tables is not None:
        spread(group)
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
