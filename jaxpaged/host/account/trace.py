"""Takes down what a run did to the page pool, so that it can be replayed and looked at: `jaxpaged trace`.

A recorder looks at the scheduler after every plan and after every commit and writes down what differs from its last
look: nothing in the scheduler knows of it. A trace is one JSON object:

    format, version    "jaxpaged trace", 1
    title, note        for the reader
    num_pages          of the pool, page 0 included, which is never handed out
    page_size          token positions in a page
    first_label        how page 1 is to be called: 1, unless a figure counts from another number
    requests           [{"id", "kind": "sample" | "samples" | "beams", "width", "prompt_len"}], in order of arrival; a
                       prefix that all of them share is the first, and never ends
    sequences          the request of each sequence, in order of appearance
    cached             pages that are known by their tokens from earlier runs, and rest when this one begins; or absent
    pieces             {token id: text}, if there is a tokenizer
    frames             the run: a frame a plan, and one a commit that changed block tables

A frame has "step" (from 1), "kind" ("prefill", "decode", "mixed" or "commit"), "computed" (tokens that the step
computes), and what changed, to be applied in this order (absent where nothing did):

    gone      [sequence, count]: the first `count` pages of its table, which no window reaches any more, are given back
    grow      sequences that fill one more position of the last page they have
    tables    [sequence, kept, num_slots, page, ...]: the first `kept` pages stay, these follow, `num_slots` are filled
    tokens    [sequence, token, ...] that are new: a prompt at its first sight, then what each step chose
    forks     [sequence, parent, kept, token, ...]: it has the parent's table, the parent's first `kept` tokens, these
    cached    pages that rest from now on: no table holds them, and whoever begins with their tokens finds them
    uncached  pages that rested and do so no more: somebody found them, or got them for other tokens
    events    what it means, for people: ["admit", request], ["preempt", request, way], ["resume", request, way] with
              the way "swap" or "recompute"; ["append", sequence, page, ...]; ["find", sequence, page, ...] for pages
              that were known by their tokens; ["copy", sequence, source, copy]; ["fork", sequence, parent]; ["finish",
              sequence, reason] with "stop", "length", "error", or for a beam "dropped" or "done"; ["free", page, ...]
              and ["cache", page, ...] when the last table lets go of them. The pages to which a request returns are in
              "tables" alone

Reference counts are not stored: they are the number of tables that name a page. A sequence that is swapped out, waits
or has finished has an empty table. A page that is cached is in none. What is gone is 0 in a table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxpaged.config import CacheConfig
from jaxpaged.host.pages.block_table import PageCopy
from jaxpaged.host.pages.page_allocator import PageAllocator
from jaxpaged.host.pages.prefix_cache import PrefixCache
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.host.sequence import Sequence, SequenceGroup, SequenceStatus
from jaxpaged.host.step.step_plan import StepPlan
from jaxpaged.step_io import NULL_PAGE

FORMAT, VERSION = "jaxpaged trace", 1

Frame = dict[str, Any]
_CHANGES = ("gone", "grow", "tables", "tokens", "forks", "cached", "uncached", "events")


@dataclass(slots=True)
class _Seen:
    """A sequence as it was at the last look."""

    index: int
    group: SequenceGroup
    status: SequenceStatus = SequenceStatus.WAITING
    pages: list[int] = field(default_factory=list)
    num_slots: int = 0
    token_ids: list[int] = field(default_factory=list)


class TraceRecorder:
    """Takes one run down: as `Engine.recorder`, or by calls of `planned` and `committed` around each step, and of
    `begin` before the first where pages are known from earlier runs."""

    def __init__(self, cache: CacheConfig):
        self.frames: list[Frame] = []
        self._cache = cache
        self._requests: dict[SequenceGroup, int] = {}
        self._owners: list[int] = []  # the request of each sequence
        self._live: dict[Sequence, _Seen] = {}  # in order of appearance
        self._token_ids: set[int] = set()
        self._num_steps = 0
        self._prefix_pages: set[int] = set()  # of a prefix that all requests share
        self._resting: dict[int, bytes] = {}  # pages that nobody holds but that are known, and by which hash
        self._cached_before: list[int] = []  # which rested before the run
        self._found: set[int] | None = None  # pages that a sequence need not compute if it gets them at this look

    def begin(self, scheduler: Scheduler) -> None:
        """Call before the first plan."""
        if isinstance(scheduler.allocator, PageAllocator):
            known = scheduler.allocator.known
            self._resting = {page: known.hashes[page] for page in known.resting}
            self._cached_before = sorted(self._resting)

    def planned(self, plan: StepPlan, scheduler: Scheduler) -> None:
        """Call when the scheduler has made `plan`."""
        self._num_steps += 1
        frame = self._new_frame("mixed" if plan.is_mixed else "prefill" if plan.is_prefill else "decode")
        frame["computed"] = sum(row.count for row in plan.rows)
        self._look(frame, scheduler, plan.copies)
        self.frames.append(frame)

    def committed(self, scheduler: Scheduler) -> None:
        """Call when the scheduler has learnt what the step gave."""
        frame = self._new_frame("commit")
        self._look(frame, scheduler, [])
        if any(frame[name] for name in ("events", "tables", "forks", "cached", "uncached")):
            self.frames.append(frame)
        else:
            _add_tokens(self.frames[-1], frame["tokens"])

    def trace(self, title: str, note: str = "", piece: Callable[[int], str] | None = None) -> dict[str, Any]:
        """The trace up to now; `piece` writes one token as text."""
        trace = {
            "format": FORMAT, "version": VERSION, "title": title, "note": note,
            "num_pages": self._cache.num_pages, "page_size": self._cache.page_size, "first_label": 1,
            "requests": [_describe(group) for group in self._requests],
            "sequences": self._owners,
            "frames": [{name: value for name, value in frame.items() if value != []} for frame in self.frames],
        }  # fmt: skip
        if self._cached_before:
            trace["cached"] = self._cached_before
        if piece is not None:
            trace["pieces"] = {str(token_id): piece(token_id) for token_id in sorted(self._token_ids)}
        return trace

    def _new_frame(self, kind: str) -> Frame:
        return {"step": self._num_steps, "kind": kind, **{name: [] for name in _CHANGES}}

    # One look: what differs from the last one

    def _look(self, frame: Frame, scheduler: Scheduler, copies: list[PageCopy]) -> None:
        shared = [] if scheduler.prefix is None else [scheduler.prefix]
        self._prefix_pages = {page for table in scheduler.prefix_tables for page in table.pages}
        groups = [*shared, *scheduler.running, *scheduler.waiting]
        if isinstance(scheduler.allocator, PageAllocator):
            self._note_resting(frame, scheduler.allocator.known)
        lost: list[int] = []  # pages that some table had at the last look and has no more
        for group in groups:
            if group.beams and group.is_forked:
                self._find_beams(frame, group, lost)
        self._note_ends(frame, {sequence for group in groups for sequence in group.unfinished}, lost)
        copied = {copy.dst: copy.src for copy in copies}
        for group in groups:
            if group not in self._requests:
                self._requests[group] = len(self._requests)
                self._open(group.sequences[0], group)
            came_back = self._note_status(frame, group)
            known = [sequence for sequence in group.unfinished if sequence in self._live]
            for sequence in known:
                lost += self._note_table(frame, sequence, copied, is_append=not came_back)
                self._note_tokens(frame, sequence)
            for sequence in group.unfinished:
                if sequence not in self._live:
                    self._note_new(frame, sequence, group, known)
        lost += frame["uncached"]
        freed = set(lost).difference([NULL_PAGE], *(seen.pages for seen in self._live.values())) if lost else set()
        for name, pages in (("free", freed - self._resting.keys()), ("cache", freed & self._resting.keys())):
            if pages:
                frame["events"].append([name, *sorted(pages)])

    def _note_resting(self, frame: Frame, known: PrefixCache) -> None:
        """Which pages rest now; and which hold what a sequence may find: those that rested, and those of tables."""
        if not known.is_on:
            return
        before, self._resting = self._resting, {page: known.hashes[page] for page in known.resting}
        frame["cached"] += sorted(self._resting.keys() - before.keys())
        frame["uncached"] += sorted(before.keys() - self._resting.keys())
        held = {page for seen in self._live.values() for page in seen.pages}
        self._found = {page for page, one in before.items() if known.hashes.get(page) == one} | held

    def _open(self, sequence: Sequence, group: SequenceGroup) -> _Seen:
        seen = self._live[sequence] = _Seen(len(self._owners), group)
        self._owners.append(self._requests[group])
        return seen

    def _find_beams(self, frame: Frame, group: SequenceGroup, lost: list[int]) -> None:
        """Beams change places among the sequences of their search: know each again by its tokens, and who is gone."""
        seen = [self._live.pop(sequence) for sequence, one in [*self._live.items()] if one.group is group]
        for sequence in group.unfinished:
            for one in seen:
                if one.token_ids == sequence.token_ids[: len(one.token_ids)]:  # the first child is its parent
                    self._live[sequence] = one
                    seen.remove(one)
                    break
        for one in seen:
            frame["tables"].append([one.index, 0, 0])
            frame["events"].append(["finish", one.index, "dropped"])
            lost += one.pages

    def _note_ends(self, frame: Frame, unfinished: set[Sequence], lost: list[int]) -> None:
        for sequence, seen in [item for item in self._live.items() if item[0] not in unfinished]:
            self._note_tokens(frame, sequence)
            lost += self._note_table(frame, sequence, {}, is_append=False)
            is_search_over = all(other.status is SequenceStatus.FINISHED for other in seen.group.sequences)
            reason = sequence.finish_reason or ("done" if is_search_over else "dropped")
            frame["events"].append(["finish", seen.index, reason])
            del self._live[sequence]

    def _note_status(self, frame: Frame, group: SequenceGroup) -> bool:
        """Admission, preemption or return of a group; whether it returned."""
        seen = [self._live[sequence] for sequence in group.unfinished if sequence in self._live]
        if not seen:  # all of it has ended, and waits for the end of its batch
            return False
        before, now = seen[0].status, group.unfinished[0].status
        if before is now:
            return False
        request, running = self._requests[group], SequenceStatus.RUNNING
        is_first = now is running and all(one.num_slots == 0 for one in seen) and not group.num_preemptions
        if is_first:
            frame["events"].append(["admit", request])
        elif now is running:
            frame["events"].append(["resume", request, "swap" if before is SequenceStatus.SWAPPED else "recompute"])
        else:
            frame["events"].append(["preempt", request, "swap" if now is SequenceStatus.SWAPPED else "recompute"])
        for one in seen:
            one.status = now
        return now is running and not is_first

    def _note_table(self, frame: Frame, sequence: Sequence, copied: dict[int, int], is_append: bool) -> list[int]:
        """Returns the pages that the table lost."""
        seen = self._live[sequence]
        holds_pages = sequence.status is SequenceStatus.RUNNING  # of a swapped one, the table names places elsewhere
        pages = list(sequence.table.pages) if holds_pages else []
        num_slots = sequence.table.num_slots if holds_pages else 0
        gone = self._note_gone(frame, seen, sequence.table.num_gone if holds_pages else 0)
        kept = _common_prefix_len(seen.pages, pages)
        lost, new = seen.pages[kept:], pages[kept:]
        if lost or new or num_slots not in (seen.num_slots, seen.num_slots + 1):
            frame["tables"].append([seen.index, kept, num_slots, *new])
        elif num_slots == seen.num_slots + 1:
            frame["grow"].append(seen.index)
        others = {NULL_PAGE} if seen.group.is_prefix else {NULL_PAGE, *self._prefix_pages}
        taken = [page for page in new if page not in others]
        at = next((i for i, page in enumerate(taken) if page in copied), None)
        if at is not None:
            frame["events"].append(["copy", seen.index, copied[taken[at]], taken[at]])
            taken = taken[at + 1 :]
        if taken and is_append:
            self._note_taken(frame, seen.index, taken)
        seen.pages, seen.num_slots = pages, num_slots
        return gone + lost

    def _note_gone(self, frame: Frame, seen: _Seen, num_gone: int) -> list[int]:
        """Take the pages out of what was seen that are given back now; returns them."""
        num_gone = min(num_gone, len(seen.pages))
        gone = [page for page in seen.pages[:num_gone] if page != NULL_PAGE]
        if gone:
            frame["gone"].append([seen.index, num_gone])
            seen.pages = [NULL_PAGE] * num_gone + seen.pages[num_gone:]
        return gone

    def _note_taken(self, frame: Frame, sequence: int, pages: list[int]) -> None:
        if self._found is None:
            frame["events"].append(["append", sequence, *pages])
            return
        for name, is_found in (("find", True), ("append", False)):
            if some := [page for page in pages if (page in self._found) is is_found]:
                frame["events"].append([name, sequence, *some])
        self._found.update(pages)  # another sequence of this step that has them, too, found them

    def _note_tokens(self, frame: Frame, sequence: Sequence) -> None:
        seen = self._live[sequence]
        new = sequence.token_ids[len(seen.token_ids) :]
        if new:
            frame["tokens"].append([seen.index, *new])
            self._token_ids.update(new)
            seen.token_ids += new

    def _note_new(self, frame: Frame, sequence: Sequence, group: SequenceGroup, known: list[Sequence]) -> None:
        """A sequence at its first sight: forked from one with the same table."""
        seen = self._open(sequence, group)
        seen.status = sequence.status
        table = sequence.table
        parents = [
            other for other in known if (other.table.pages, other.table.num_slots) == (table.pages, table.num_slots)
        ]
        if not parents:
            self._note_table(frame, sequence, {}, is_append=True)
            self._note_tokens(frame, sequence)
            return
        kept = _common_prefix_len(parents[0].token_ids, sequence.token_ids)
        parent = self._live[parents[0]].index
        frame["forks"].append([seen.index, parent, kept, *sequence.token_ids[kept:]])
        frame["events"].append(["fork", seen.index, parent])
        seen.pages, seen.num_slots, seen.token_ids = list(table.pages), table.num_slots, sequence.token_ids[:]
        self._token_ids.update(sequence.token_ids[kept:])


def _add_tokens(frame: Frame, tokens: list[list[int]]) -> None:
    """Give a frame what its step chose; a sequence that the frame forked gets it with the fork."""
    forks = {fork[0]: fork for fork in frame["forks"]}
    for sequence, *new in tokens:
        if sequence in forks:
            forks[sequence] += new
        else:
            frame["tokens"].append([sequence, *new])


def _describe(group: SequenceGroup) -> dict[str, Any]:
    width = group.params.num_samples
    kind = "beams" if group.beams else "samples" if width > 1 else "sample"
    return {"id": group.request_id, "kind": kind, "width": width, "prompt_len": group.prompt_len}


def _common_prefix_len(a: list[int], b: list[int]) -> int:
    if len(a) <= len(b) and b[: len(a)] == a:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
