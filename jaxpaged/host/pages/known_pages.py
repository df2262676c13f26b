"""When pages of sequences become known, and which of them a sequence finds when it is placed.

A page may be found as soon as the step that fills it is planned: the device carries out one step after the other, so
whoever finds it reads it later. Prompts are known by chunks, as they are planned; what a sequence has generated, when
it ends or gives way, since nobody can ask for it before, and a decode step then costs nothing. Tokens that are not
known yet (`Sequence.num_pending`) are in no page that is. All tables that hold a known page see it full: it is never
written again.
"""

from __future__ import annotations

from array import array

from jaxpaged.host.pages.page_allocator import PageAllocator
from jaxpaged.host.pages.window import PageWindow
from jaxpaged.host.sequence import Sequence, SequenceGroup


class KnownPages:
    """The pages of one pool that are known by their tokens; none without an allocator, where no pages are shared."""

    def __init__(self, allocator: PageAllocator | None, window: PageWindow | None = None):
        self._allocator = allocator
        self._window = window

    def find(self, group: SequenceGroup, sequence: Sequence) -> list[int]:
        """Pages that hold the first tokens of a sequence, all but the last where that has to give logits.

        NULL_PAGE for those that no window reaches from there on, where nobody else is to share them.
        """
        if self._allocator is None or group.params.prompt_logprobs is not None:  # which every position has to give
            return []
        gives_logits = not (group.is_prefix or (group.beams and group.is_forked))
        most = (group.num_to_prefill(sequence) - gives_logits) // self._allocator.page_size
        known, ids, chain = self._allocator.known, _packed(sequence, group), _chain(sequence, group)
        if self._window is None or group.is_prefix or len(group.unfinished) > 1:
            return known.find(ids, chain, most)
        found = known.find_last(ids, chain, most, self._window.num_unread)
        return found if self._window.can_take(found, group.num_to_prefill(sequence)) else []

    def add_computed(self, group: SequenceGroup, sequence: Sequence, start: int, stop: int) -> None:
        """A step is planned that computes these positions, all of whose tokens are known."""
        if self._allocator is None:
            return
        size = self._allocator.page_size
        if start // size < stop // size:
            ids, chain = _packed(sequence, group), _chain(sequence, group)
            self._allocator.known.add(sequence.table.pages, ids, chain, start // size, stop // size)

    def add_generated(self, group: SequenceGroup, sequence: Sequence) -> None:
        """A sequence is about to let go of its pages; those that came back from swap space are others than before."""
        stop = min(sequence.num_computed, len(sequence.token_ids))
        self.add_computed(group, sequence, 0 if group.num_swaps else sequence.prompt_len, stop)


def _packed(sequence: Sequence, group: SequenceGroup) -> array:
    return array("i", sequence.token_ids) if group.beams else sequence.pack_ids()


def _chain(sequence: Sequence, group: SequenceGroup) -> list[bytes]:
    """Beams change places, and with them all tokens behind the prompt: of these no hash is kept."""
    return [] if group.beams else sequence.page_hashes
