"""From a finished sequence group to the `RequestOutput` that the user gets: the best samples, texts, the account."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.outputs import CompletionOutput, KVUsage, Logprob, RequestMetrics, RequestOutput
from jaxpaged.host.beams.beam_logprobs import logprobs_of
from jaxpaged.host.beams.beam_state import Hypothesis, best_hypotheses
from jaxpaged.host.sequence import Sequence, SequenceGroup
from jaxpaged.host.step.logprob_entry import Entry
from jaxpaged.step_io import BAD_LOGITS
from jaxpaged.text.beam_text import BeamText
from jaxpaged.text.stream import StopStringStream, TextStream, decode_continuation
from jaxpaged.text.tokenizer import Tokenizer


def make_output(group: SequenceGroup, tokenizer: Tokenizer | None) -> RequestOutput:
    """What came of a group that has finished; without a tokenizer all texts are empty."""
    pages = group.pages
    prompt_ids, prompt_logprobs = _prompt_ids(group), None
    if group.params.prompt_logprobs is not None and group.failure != BAD_LOGITS:  # which may be in them
        prompt_logprobs = [None, *make_logprobs(group.prompt_logprobs, prompt_ids[:1], prompt_ids[1:], tokenizer)]
    return RequestOutput(
        request_id=group.request_id,
        prompt=group.prompt,
        prompt_token_ids=prompt_ids,
        prompt_logprobs=prompt_logprobs,
        outputs=_completions(group, tokenizer),
        finished=True,
        metrics=RequestMetrics(
            group.arrival_time, group.first_scheduled_time, group.first_token_time, group.finished_time
        ),
        kv=KVUsage(
            pages.physical_at_peak, pages.logical_at_peak, pages.most_shared, pages.copied,
            group.num_preemptions, group.recomputed_tokens, group.num_swaps, group.cached_tokens,
        ),
        error=group.error,
        carried=group.carried,
    )  # fmt: skip


def _prompt_ids(group: SequenceGroup) -> list[int]:
    return group.sequences[0].token_ids[: group.prompt_len]


def _completions(group: SequenceGroup, tokenizer: Tokenizer | None) -> list[CompletionOutput]:
    params = group.params
    if isinstance(params, BeamSearchParams):
        best = best_hypotheses(group.beams, params.num_returned)
        found = [_beam(group, params, hypothesis, i, tokenizer) for i, hypothesis in enumerate(best)]
        return found if group.error is None else [*found, _sample(group, group.sequences[0], len(found), tokenizer)]
    chosen = group.sequences
    if params.num_samples > params.num_returned:
        chosen = sorted(chosen, key=lambda s: (s.finish_reason == "error", -s.cumulative_logprob))
        chosen = chosen[: params.num_returned]
    return [_sample(group, sequence, i, tokenizer) for i, sequence in enumerate(chosen)]


def _beam(
    group: SequenceGroup, params: BeamSearchParams, found: Hypothesis, index: int, tokenizer: Tokenizer | None
) -> CompletionOutput:
    last = found.token_ids[-1]
    ended_by_token = last in group.eos_ids | group.stop_ids
    text, stop = "", None
    if tokenizer is not None and params.detokenize:
        beam_text = BeamText(tokenizer, _prompt_ids(group), params)
        text, stop = beam_text.of_output(found.token_ids, ended_by_token)
    if last in group.stop_ids - group.eos_ids:
        stop = last
    logprobs = None
    if params.logprobs is not None:
        entries = logprobs_of(found, group.beams[found.search].logprobs, params.logprobs)
        logprobs = make_logprobs(entries, _prompt_ids(group), found.token_ids, tokenizer)
    return CompletionOutput(
        index, text, found.token_ids, found.cumulative_logprob, logprobs,
        "stop" if ended_by_token or stop is not None or _is_complete(group, found.token_ids) else "length", stop,
        found.score,
    )  # fmt: skip


def _is_complete(group: SequenceGroup, token_ids: list[int]) -> bool:
    """Whether an output has ended because nothing could follow in what limits it."""
    return group.limit is not None and group.limit.is_complete(token_ids)


def _sample(group: SequenceGroup, sequence: Sequence, index: int, tokenizer: Tokenizer | None) -> CompletionOutput:
    assert sequence.finish_reason is not None
    output_ids, logprobs = sequence.output_ids, None
    if group.params.logprobs is not None and not group.beams:
        logprobs = make_logprobs(sequence.logprobs, _prompt_ids(group), output_ids, tokenizer)
    return CompletionOutput(
        index=index,
        text=text_of(group, sequence, tokenizer),
        token_ids=output_ids,
        cumulative_logprob=sequence.cumulative_logprob,
        logprobs=logprobs,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
    )


def text_of(group: SequenceGroup, sequence: Sequence, tokenizer: Tokenizer | None) -> str:
    """Of a sample that has ended."""
    params = group.params
    if tokenizer is None or not params.detokenize:
        return ""
    if isinstance(sequence.stop_reason, str) and isinstance(sequence.stream, StopStringStream):
        return sequence.stream.text
    output = sequence.output_ids
    ended_by_token = sequence.finish_reason == "stop" and output[-1] in group.eos_ids | group.stop_ids
    if ended_by_token and not params.include_stop_str_in_output:
        output = output[:-1]
    prompt = sequence.token_ids[: sequence.prompt_len]
    return decode_continuation(tokenizer, prompt, output, params.skip_special_tokens)


def make_logprobs(
    entries: Iterable[Entry], before_ids: SequenceOf[int], token_ids: SequenceOf[int], tokenizer: Tokenizer | None
) -> list[dict[int, Logprob]]:
    """Each token's entry with the text that it, or another in its place, adds to that of the tokens before it."""
    stream = TextStream(tokenizer.decode, before_ids, skip_special_tokens=False) if tokenizer is not None else None
    logprobs = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        logprobs.append(
            {i: Logprob(logprob, rank, stream.peek(i) if stream else None) for i, (logprob, rank) in entry.items()}
        )
        if stream is not None:
            stream.push(token_id)
    return logprobs
