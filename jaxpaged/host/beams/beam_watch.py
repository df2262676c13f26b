"""Takes the picture of a search between two steps, from the choices that its states keep."""

from __future__ import annotations

import math

from jaxpaged.api.beam_snapshot import BeamSnapshot, FinishedBeam, RunningBeam, SearchSnapshot
from jaxpaged.api.outputs import RequestOutput
from jaxpaged.host.beams.beam_state import BeamState
from jaxpaged.host.sequence import SequenceGroup


def take_snapshot(group: SequenceGroup, step: int, output: RequestOutput | None) -> BeamSnapshot:
    tables = [sequence.table.held for sequence in group.unfinished]
    pages, logical_pages = len(set().union(*tables)), sum(map(len, tables))
    if group.tables is not None:
        pages, logical_pages = group.tables.physical, group.tables.logical
    return BeamSnapshot(
        step=step,
        searches=[_search(state) for state in group.beams],
        pages=pages,
        logical_pages=logical_pages,
        output=output,
    )


def _search(state: BeamState) -> SearchSnapshot:
    running: list[RunningBeam] = []
    if not state.is_done:
        beams = zip(state.running_token_ids().tolist(), state.running_scores.tolist(), strict=True)
        running = [RunningBeam(token_ids, score) for token_ids, score in beams if score > -math.inf]
    return SearchSnapshot(
        running=running,
        parents=state.parents[-1].tolist()[: len(running)] if running else [],
        finished=[FinishedBeam(h.token_ids, h.cumulative_logprob, h.score, h.beams) for h in state.hypotheses()],
        is_done=state.is_done,
    )
