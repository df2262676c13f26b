"""Files a step's log-probabilities with the requests that asked for them, as {token id: (log-probability, rank)}."""

from __future__ import annotations

import numpy as np

from jaxpaged.host.step.logprob_entry import Entry, make_entry
from jaxpaged.host.step.step_plan import StepPlan
from jaxpaged.step_io import BAD_LOGITS, StepOutputs, TokenLogprobs


def collect_logprobs(plan: StepPlan, outputs: StepOutputs) -> None:
    """To be called before `Scheduler.commit` of the same plan."""
    for i, (group, sequence, _) in enumerate(plan.samples):
        if group.params.logprobs is None or group.beams or sequence.finish_reason is not None:
            continue
        if (token_id := int(outputs.tokens[i])) >= 0:
            sequence.logprobs.append(_entry(outputs.token_logprobs, i, token_id, group.params.logprobs))
    if outputs.prompt_logprobs is not None:
        _collect_prompt_logprobs(plan, outputs.prompt_logprobs)


def _collect_prompt_logprobs(plan: StepPlan, logprobs: TokenLogprobs) -> None:
    offset = 0
    for row in plan.rows:
        wanted, known = row.group.params.prompt_logprobs, row.group.prompt_logprobs
        if wanted is not None and row.sequence.finish_reason is None:
            # The logits behind position p speak of the token at p + 1; what a preemption repeats is filed once.
            for position in range(max(row.start, len(known)), min(row.start + row.count, row.group.prompt_len - 1)):
                token_id = row.sequence.token_ids[position + 1]
                if np.isnan(logprobs.logprobs[offset + position - row.start]):
                    row.group.failure = BAD_LOGITS  # the request ends when its prompt is computed
                known.append(_entry(logprobs, offset + position - row.start, token_id, wanted))
        offset += row.count


def _entry(logprobs: TokenLogprobs, i: int, token_id: int, count: int) -> Entry:
    assert logprobs.ranks is not None and logprobs.top_ids is not None and logprobs.top_logprobs is not None
    return make_entry(
        token_id, logprobs.logprobs[i], logprobs.ranks[i], logprobs.top_ids[i], logprobs.top_logprobs[i], count
    )
