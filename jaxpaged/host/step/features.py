"""What the requests of a run ask of a step, in sum: it decides which arrays a step has, and so which program runs.

The union over a whole run is taken, not over one step, so that programs do not change as requests come and go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import MethodType

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.request_params import LogitsProcessor, RequestParams
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.host.beams.beam_state import BeamState
from jaxpaged.host.beams.gathering import can_gather
from jaxpaged.host.constraints.in_text import TextLimit
from jaxpaged.host.constraints.trie_set import TrieSet
from jaxpaged.host.sequence import SequenceGroup
from jaxpaged.step_io import Wanted

#: How many likeliest tokens a step is compiled to return: few sizes, so few programs.
LOGPROB_SIZES = (0, 5, 20, 100)


@dataclass(frozen=True)
class SamplingFeatures:
    """Counts are rounded up to powers of two, those of beams above 64 to fewer."""

    has_samples: bool = False  # some request has several samples, which share the pages of its prompt
    has_prefix: bool = False  # the requests share the pages of a prefix
    draws_tokens: bool = True  # not all requests are beam searches
    num_candidates: int = 0  # likeliest continuations to return, of every row or group of beams; 0: no beams
    draws_beams: bool = False  # some beam search draws its candidates
    merged_widths: tuple[int, int] | None = None  # of the least and widest group of beams; None: not merged
    max_ends: int = 0  # tokens that end beams of one group, where these are merged
    has_host_beams: bool = False  # some beam search asks for what the host alone can choose beams by
    beam_logprobs: bool = False  # some beam search keeps log-probabilities
    is_random: bool = False  # some request has a temperature
    is_filtered: bool = False  # ... and top_p, top_k or min_p
    is_penalised: bool = False
    max_edits: int = 0  # logits of one row that bias, banned words or min_tokens may change
    has_banned_phrases: bool = False  # some request's bad_words have several tokens, the last of which is banned
    max_allowed: int = 0  # tokens in the longest allowed_token_ids
    processors: tuple[LogitsProcessor, ...] = ()
    tries: TrieSet | None = None  # in which the outputs of some requests are
    has_masks: bool = False  # some request's text is to match something
    num_logprobs: int | None = None  # likeliest tokens to return; None: not even the chosen one's rank
    num_prompt_logprobs: int | None = None

    @classmethod
    def of(cls, groups: Iterable[SequenceGroup], vocab_size: int) -> SamplingFeatures:
        groups = list(groups)
        params = [group.params for group in groups]
        drawn = [p for p in params if isinstance(p, SamplingParams)]
        states = [state for group in groups for state in group.beams]
        return cls(
            num_candidates=_candidates(states, vocab_size),
            draws_tokens=bool(drawn) or not params,
            merged_widths=_merged_widths(states),
            max_ends=_power_of_two(max((len(state.end_ids) for state in states), default=0)),
            has_host_beams=any(group.beams and not can_gather(group) for group in groups),
            beam_logprobs=any(isinstance(p, BeamSearchParams) and p.logprobs is not None for p in params),
            has_samples=any(p.num_samples > 1 for p in params),
            has_prefix=any(group.prefix_len for group in groups),
            draws_beams=any(isinstance(p, BeamSearchParams) and p.do_sample for p in params),
            is_random=any(p.temperature > 0 for p in drawn),
            is_filtered=any(p.temperature > 0 and (p.top_p < 1 or p.top_k > 0 or p.min_p > 0) for p in drawn),
            is_penalised=any(penalties(p) != (1, 0, 0) for p in params),
            max_edits=_power_of_two(max(map(_most_edits, groups), default=0)),
            has_banned_phrases=any(len(word) > 1 for group in groups for word in group.banned_words),
            max_allowed=_power_of_two(max((len(p.allowed_token_ids or ()) for p in params), default=0)),
            processors=_all_processors(params),
            tries=TrieSet.of(groups),
            has_masks=any(isinstance(group.limit, TextLimit) for group in groups),
            num_logprobs=_logprob_size([p.logprobs for p in params], vocab_size),
            num_prompt_logprobs=_logprob_size([p.prompt_logprobs for p in params], vocab_size),
        )

    @property
    def wanted(self) -> Wanted:
        return Wanted(
            self.draws_tokens, self.num_logprobs, self.num_candidates, self.draws_beams, self.beam_logprobs,
            self.num_prompt_logprobs,
        )  # fmt: skip

    @property
    def needs_seeds(self) -> bool:
        return self.is_random or self.draws_beams

    @property
    def needs_history(self) -> bool:
        return self.is_penalised or bool(self.processors)

    @property
    def needs_tokens(self) -> bool:
        """Whether the arrays of a step depend on the tokens that the step before it chose."""
        return self.has_banned_phrases or self.has_masks

    @property
    def can_run_ahead(self) -> bool:
        """Whether every step can be planned while the one before it runs."""
        return not self.needs_tokens and not self.has_host_beams


def processor_places(processors: Sequence[LogitsProcessor], params: RequestParams) -> list[int]:
    """Where a request's own processors stand among those of a run, one behind the other: up to the first that does not.

    Processors do not commute, so a place that is out of the request's order is none of its.
    """
    places: list[int] = []
    for processor in params.logits_processors or ():
        start = places[-1] + 1 if places else 0
        place = next((i for i in range(start, len(processors)) if _is_same(processors[i], processor)), None)
        if place is None:
            break
        places.append(place)
    return places


def _is_same(one: LogitsProcessor, other: LogitsProcessor) -> bool:
    """One object, or one method of one object: what a class calls equal may still compute something else."""
    return one is other or (isinstance(one, MethodType) and isinstance(other, MethodType) and one == other)


def penalties(params: RequestParams) -> tuple[float, float, float]:
    return params.repetition_penalty, params.presence_penalty, params.frequency_penalty


def _all_processors(params: list[RequestParams]) -> tuple[LogitsProcessor, ...]:
    """The processors of all requests, each request's in its order: one stands there twice where orders differ."""
    processors: list[LogitsProcessor] = []
    for one in params:
        known = len(processor_places(processors, one))
        processors += list(one.logits_processors or ())[known:]
    return tuple(processors)


def _most_edits(group: SequenceGroup) -> int:
    ends = len(group.eos_ids | group.stop_ids) if group.params.min_tokens else 0
    return len(group.params.logit_bias or ()) + len(group.banned_words) + ends


def _logprob_size(wanted: list[int | None], vocab_size: int) -> int | None:
    """The compiled size that serves all requests: None if none wants log-probabilities; -1 asks for the vocabulary."""
    counts = [vocab_size if count == -1 else count for count in wanted if count is not None]
    if not counts:
        return None
    return next((size for size in LOGPROB_SIZES if max(counts) <= size <= vocab_size), vocab_size)


def _candidates(states: list[BeamState], vocab_size: int) -> int:
    count = _rounded(max((state.row_candidates for state in states), default=0))
    return min(count, vocab_size) if _merged_widths(states) is None else count


def _merged_widths(states: list[BeamState]) -> tuple[int, int] | None:
    """The least width of all groups of beams, rounded down, and the most, rounded up; None without beams, and where
    merging is not possible: diverse groups wait for one another."""
    widths = [width for state in states for width in state.widths]
    if not states or any(state.earlier for state in states):
        return None
    return 1 << min(widths).bit_length() - 1, _rounded(max(widths))


def _rounded(count: int) -> int:
    """Up to 64 a power of two, then one of eight numbers between two of them."""
    size = _power_of_two(count)
    step = max(1, size // 16)
    return size if size <= 64 else -(-count // step) * step


def _power_of_two(count: int) -> int:
    return 0 if count == 0 else 1 << (count - 1).bit_length()
