"""A sequence is one stream of tokens; a sequence group is all sequences of one request, scheduled together."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxpaged.api.request_params import RequestParams
from jaxpaged.host.beams.beam_state import BeamState
from jaxpaged.host.constraints.places import RequestLimit, SamplePlace
from jaxpaged.host.pages.beam_tables import BeamTables
from jaxpaged.host.pages.block_table import BlockTable


class SequenceStatus(enum.Enum):
    WAITING = "waiting"  # holds no pages: not yet admitted, or preempted and to be computed again
    RUNNING = "running"
    SWAPPED = "swapped"  # preempted, its pages in swap space: the block table names places there (swap.py)
    FINISHED = "finished"


class StopStrings(Protocol):
    """Turns tokens into text as they come and looks for stop strings."""

    def push(self, token_id: int, *, may_stop: bool) -> str | None:
        """Take one more token; the stop string that it completes, if any."""
        ...


@dataclass(slots=True, eq=False)  # compared by identity
class Sequence:
    """One stream of tokens and the pages that hold its KV."""

    sample_index: int  # which sample of its request
    token_ids: list[int]  # prompt, then output, as far as the host knows them
    prompt_len: int
    table: BlockTable = field(default_factory=BlockTable)
    num_computed: int = 0  # leading tokens whose KV is in the pages, or will be when the planned step has run
    num_once_computed: int = (
        0  # the most that `num_computed` ever was: what lies below is recomputed after a preemption
    )
    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: str | None = None  # "stop", "length" or "error"
    stop_reason: int | str | None = None
    cumulative_logprob: float = 0.0
    logprobs: list[Any] = field(default_factory=list)  # one entry a generated token, if the request wants them
    stream: StopStrings | None = None
    place: SamplePlace | None = None  # of a sample, in what limits its request
    num_pending: int = 0  # 1 while the step in flight chooses a token of it, behind those that are known
    pending_row: int = 0  # of that step's outputs
    packed_ids: array = field(default_factory=lambda: array("i"))  # int32 of `token_ids`, as far as somebody asked
    page_hashes: list[bytes] = field(default_factory=list)  # by which its full pages are known; likewise

    @property
    def num_tokens(self) -> int:
        """Its length: the tokens that are known, and the one that is being chosen."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.prompt_len

    def pack_ids(self) -> array:
        """`token_ids` as int32, which numpy reads as they are; of a sequence whose tokens are only added to."""
        self.packed_ids.extend(self.token_ids[len(self.packed_ids) :])
        return self.packed_ids

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]


@dataclass(slots=True)
class GroupPages:
    """The most pages that one group ever held; "logical" counts a page once for each table that names it.

    Between two events (a fork, the end of a sample, a preemption, a page that no window reaches) a group's pages only
    grow and its sharing only shrinks, so recording right after forks and right before releases misses no peak.
    """

    physical_at_peak: int = 0
    logical_at_peak: int = 0
    most_shared: int = 0
    copied: int = 0
    physical: int = 0  # as last recorded

    def record(self, tables: list[BlockTable]) -> None:
        held = [table.held for table in tables]
        self.note(len(set().union(*held)), sum(map(len, held)))

    def note(self, physical: int, logical: int) -> None:
        """`record` for who has counted already."""
        self.physical = physical
        if physical >= self.physical_at_peak:
            self.physical_at_peak, self.logical_at_peak = physical, logical
        self.most_shared = max(self.most_shared, logical - physical)


@dataclass(slots=True, eq=False)
class SequenceGroup:
    """One request. It starts as a single sequence; when its prompt is computed, the samples fork from it."""

    request_id: str
    prompt: str | None
    params: RequestParams
    seed: int
    sequences: list[Sequence]
    max_len: int  # tokens of prompt and output at which a sample ends
    prefix_len: int = 0  # first tokens of the prompt that every request of the run has, and shares (shared_prefix.py)
    eos_ids: frozenset[int] = frozenset()  # empty when the request ignores them
    stop_ids: frozenset[int] = frozenset()
    make_stream: Callable[[], StopStrings] | None = None  # for requests with stop strings
    carried: Mapping[str, Any] = field(default_factory=dict)  # what the caller's row had besides the prompt
    beams: list[BeamState] = field(default_factory=list)  # of a beam search, one for each of its groups of beams
    tables: BeamTables | None = None  # of all beams, while these run without sequences of their own (gathering.py)
    ends_text: Callable[[list[int]], bool] | None = None  # whether output ids of a beam complete a stop string
    limit: RequestLimit | None = None  # what `params.constraint` asks for
    banned_words: tuple[tuple[int, ...], ...] = ()  # token ids of `params.bad_words`
    pages: GroupPages = field(default_factory=GroupPages)
    prompt_logprobs: list[Any] = field(default_factory=list)
    failure: int = 0  # why it cannot go on, if it cannot: a code of step_io.py
    error: str | None = None  # the same in words, when it has ended so (failure.py)
    counted_preemptions: int = 0  # when `pages.physical` of beams was last counted
    counted_copies: int = 0  # likewise
    num_preemptions: int = 0
    num_swaps: int = 0  # preemptions that kept the pages in swap space
    cached_tokens: int = 0  # of the prompt, found in pages that were known when it was first admitted
    recomputed_tokens: int = 0
    arrival_time: float = 0.0  # seconds since the run began, as the times below; 0: it is there from the start
    first_scheduled_time: float = -1.0
    first_token_time: float = -1.0
    finished_time: float = -1.0

    @property
    def prompt_len(self) -> int:
        return self.sequences[0].prompt_len

    @property
    def is_prefix(self) -> bool:
        """Whether this is the shared prefix itself: prefilled, held, and never continued."""
        return self.prefix_len == self.prompt_len

    @property
    def is_forked(self) -> bool:
        """Whether the samples, or beams, exist as sequences of their own."""
        if self.beams:
            return self.beams[0].num_generated > 0
        return len(self.sequences) == self.params.num_samples

    @property
    def running_beams(self) -> list[BeamState]:
        return [state for state in self.beams if not state.is_done]

    def num_to_prefill(self, sequence: Sequence) -> int:
        """Tokens whose KV is computed when the group is admitted.

        A beam that comes back leaves its last token to the next decode step, in which all beams choose together.
        """
        return sequence.num_tokens - (1 if self.beams and self.is_forked else 0)

    @property
    def unfinished(self) -> list[Sequence]:
        return [s for s in self.sequences if s.status is not SequenceStatus.FINISHED]

    def record_pages(self) -> None:
        if self.tables is not None:
            self.pages.note(self.tables.physical, self.tables.logical)
            return
        self.pages.record([sequence.table for sequence in self.unfinished])

    @property
    def num_rows(self) -> int:
        """Rows of a decode step that the group fills at most: its unfinished samples or beams, forked or not."""
        if self.beams:
            return sum(state.most_rows for state in self.running_beams)
        num_samples = self.params.num_samples
        return num_samples if len(self.sequences) < num_samples else len(self.unfinished)
