"""A beam search as it stands after one of its steps: what `LLM.watch_beams` yields, for pictures and for study."""

from __future__ import annotations

from dataclasses import dataclass

from jaxpaged.api.outputs import RequestOutput


@dataclass(frozen=True, slots=True)
class RunningBeam:
    """A beam that goes on."""

    token_ids: list[int]  # generated so far
    cumulative_logprob: float


@dataclass(frozen=True, slots=True)
class FinishedBeam:
    """A hypothesis of the pool, which later ones may still push out."""

    token_ids: list[int]
    cumulative_logprob: float
    score: float
    parents: list[int]  # for each token the place, among the running beams, of the beam that it continued


@dataclass(frozen=True, slots=True)
class SearchSnapshot:
    """One group of beams; a request has `num_beam_groups` of them."""

    running: list[RunningBeam]  # best first; none when the search is done
    parents: list[int]  # for each running beam the place, among those of the step before, that it continued
    finished: list[FinishedBeam]  # best first
    is_done: bool


@dataclass(frozen=True, slots=True)
class BeamSnapshot:
    """One request after a step. Its `output` comes with the last one."""

    step: int  # from 1
    searches: list[SearchSnapshot]
    pages: int  # that the running beams hold together
    logical_pages: int  # that they would hold without sharing
    output: RequestOutput | None
