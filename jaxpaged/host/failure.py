"""Requests that cannot go on: no token is left to choose, or numbers are not finite. They end alone, with a message."""

from __future__ import annotations

from jaxpaged.host.possible_tokens import restrictions
from jaxpaged.host.sequence import SequenceGroup, SequenceStatus
from jaxpaged.host.systems.roles import Forks
from jaxpaged.step_io import BAD_LOGITS, NO_TOKEN


def fail(group: SequenceGroup, policy: Forks) -> None:
    """End a group whose `failure` is set: what is unfinished keeps its tokens, and gives all memory back."""
    group.record_pages()
    group.error = _message(group)
    for sequence in reversed(group.sequences):
        if sequence.status is not SequenceStatus.FINISHED:
            policy.release(sequence.table)
            sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = sequence.finish_reason or "error"
    if group.tables is not None:
        group.tables.release()
    for state in group.running_beams:
        state.end()


def _message(group: SequenceGroup) -> str:
    # Other samples may have got their token in the step in which one failed.
    unfinished = [s for s in group.sequences if s.finish_reason is None]
    place = f"after {min((len(s.output_ids) for s in unfinished), default=0)} generated tokens"
    if group.failure == NO_TOKEN:
        return f"no token is left to choose {place}: {restrictions(group)} made all of them impossible"
    if group.failure == BAD_LOGITS:
        return (
            f"the model's logits are not finite (NaN or infinity) {place}: its weights are damaged, or numbers "
            "overflow in this dtype"
        )
    return (
        f"logits are NaN or +inf {place}, as logits_processors or penalties made them of finite ones: they must be "
        "finite, or -inf for what is forbidden"
    )
