"""A request's beams without sequences of their own: while they run, arrays say all of them (`SequenceGroup.tables`).

Sequences are made again where single beams matter: when the group gives way, to be swapped or computed anew.
"""

from __future__ import annotations

from jaxpaged.host.constraints.in_text import TextLimit
from jaxpaged.host.pages.beam_tables import BeamTables
from jaxpaged.host.pages.page_allocator import PageAllocator
from jaxpaged.host.sequence import Sequence, SequenceGroup, SequenceStatus


def can_gather(group: SequenceGroup) -> bool:
    """Whether nothing asks for the tokens of single beams between two steps, and one search is all there is."""
    return (
        len(group.beams) == 1
        and group.ends_text is None
        and not isinstance(group.limit, TextLimit)
        and all(len(word) == 1 for word in group.banned_words)
    )  # fmt: skip


def gather(group: SequenceGroup, allocator: PageAllocator) -> None:
    """Take the beams of a step that has just run together. The sequence that stays knows the prompt."""
    first = group.sequences[0]
    num_common = first.prompt_len // allocator.page_size
    group.tables = BeamTables.gather([one.table for one in group.sequences], num_common, allocator)
    del first.token_ids[first.prompt_len :]
    group.sequences = [first]


def spread(group: SequenceGroup) -> None:
    """Give every beam a sequence with its tokens and pages; no step may be in flight."""
    assert group.tables is not None, "these beams have sequences"
    (prompt,), (state,) = group.sequences, group.beams
    num_computed = group.tables.num_slots
    outputs = state.running_token_ids().tolist()
    group.sequences = [
        Sequence(
            index, prompt.token_ids + output, prompt.prompt_len, table, num_computed, num_computed,
            SequenceStatus.RUNNING,
        )
        for index, (table, output) in enumerate(zip(group.tables.spread(), outputs, strict=True))
    ]  # fmt: skip
    group.tables = None
