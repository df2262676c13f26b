"""When a sample ends: end-of-sequence, a stop token, a stop string, what it is limited to, or its length."""

from __future__ import annotations

from jaxpaged.host.sequence import Sequence, SequenceGroup


def apply_stop(group: SequenceGroup, sequence: Sequence) -> bool:
    """Look at the token that was just appended: if it ends the sequence, set finish and stop reason and return True.

    Where several rules hold at once the order is end-of-sequence, stop token, stop string, length, as in vLLM.
    Nothing but length ends a sample before `min_tokens`; nor does a constraint of fewer tokens go on.
    """
    token_id, length = sequence.token_ids[-1], len(sequence.token_ids)
    if sequence.place is not None:
        sequence.place.push(token_id)
    may_stop = length - sequence.prompt_len >= group.params.min_tokens
    if may_stop and token_id in group.eos_ids:
        sequence.finish_reason = "stop"
    elif may_stop and token_id in group.stop_ids:
        sequence.finish_reason, sequence.stop_reason = "stop", token_id
    elif sequence.stream is not None and (stop := sequence.stream.push(token_id, may_stop=may_stop)) is not None:
        sequence.finish_reason, sequence.stop_reason = "stop", stop
    elif sequence.place is not None and sequence.place.is_over:
        sequence.finish_reason = "stop"
    elif length >= group.max_len:
        sequence.finish_reason = "length"
    else:
        return False
    return True
