"""The checks that `SamplingParams` and `BeamSearchParams` share.

Each reads fields of an object that is being made and writes them back as plain values, copies of lists among them: what
was accepted is what runs, whatever the caller does with the arguments later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jaxpaged.api.values import (
    FLOAT32_MAX,
    check_encodable,
    read_flag,
    read_int,
    read_list,
    read_number,
    read_seed,
    read_strings,
    read_token_ids,
    shortened,
)

if TYPE_CHECKING:
    from jaxpaged.api.beam_params import RequestParams

#: Beyond these, penalised logits leave the range of float32, and of beams that of their scores.
REPETITION_PENALTY_RANGE = 0.01, 100.0
#: Each is looked for at every token.
MAX_STRINGS = 10_000


def settle(params: RequestParams, name: str, value: object) -> None:
    """Set a field of a frozen dataclass while it is made."""
    object.__setattr__(params, name, value)


def read_int_field(params: RequestParams, name: str, low: int) -> None:
    settle(params, name, read_int(name, getattr(params, name), low))


def read_optional_int(params: RequestParams, name: str, low: int) -> None:
    if getattr(params, name) is not None:
        read_int_field(params, name, low)


def read_number_field(params: RequestParams, name: str, low: float, high: float, wanted: str) -> None:
    settle(params, name, read_number(name, getattr(params, name), low, high, wanted))


def read_temperature(params: RequestParams, wanted: str) -> None:
    read_number_field(params, "temperature", 0.0, FLOAT32_MAX, f"{wanted}, and finite in float32")


def read_flags(params: RequestParams, *names: str) -> None:
    for name in names:
        settle(params, name, read_flag(name, getattr(params, name)))


def read_counts(params: RequestParams) -> None:
    """max_tokens, min_tokens, seed, logprobs, prompt_logprobs."""
    read_optional_int(params, "max_tokens", 1)
    read_int_field(params, "min_tokens", 0)
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise ValueError(f"min_tokens={params.min_tokens} exceeds max_tokens={params.max_tokens}")
    if params.seed is not None:
        settle(params, "seed", read_seed(params.seed))
    for name in ("logprobs", "prompt_logprobs"):
        read_optional_int(params, name, -1)


def read_penalties(params: RequestParams) -> None:
    """repetition_penalty, presence_penalty, frequency_penalty."""
    low, high = REPETITION_PENALTY_RANGE
    wanted = f"in [{low:g}, {high:g}], where 1 means no penalty"
    read_number_field(params, "repetition_penalty", low, high, wanted)
    for name in ("presence_penalty", "frequency_penalty"):
        read_number_field(params, name, -2.0, 2.0, "in [-2, 2]")


def read_lists(params: RequestParams, what: str) -> None:
    """What ends the output and which tokens may be in it; `what` is the plain word for one output, in messages."""
    if isinstance(params.stop, str):
        check_encodable(params.stop, "stop")
    elif params.stop is not None:
        settle(params, "stop", read_strings("stop", params.stop, MAX_STRINGS))
    if "" in params.stop_strings:
        raise ValueError(f"stop contains an empty string, which would end every {what} at once")
    if params.bad_words is not None:
        settle(params, "bad_words", read_strings("bad_words", params.bad_words, MAX_STRINGS))
        if "" in params.bad_words:
            raise ValueError("bad_words contains an empty string")
    for name in ("stop_token_ids", "allowed_token_ids"):
        if getattr(params, name) is not None:
            settle(params, name, read_token_ids(name, getattr(params, name)))
    if params.allowed_token_ids is not None and len(params.allowed_token_ids) == 0:
        raise ValueError("allowed_token_ids is empty: no token could be chosen")
    if params.logit_bias is not None:
        settle(params, "logit_bias", _read_bias(params.logit_bias))
    if params.logits_processors is not None:
        settle(params, "logits_processors", _read_processors(params.logits_processors))


def _read_bias(given: object) -> dict[int, float]:
    if not isinstance(given, Mapping):
        raise ValueError(f"logit_bias must map token ids to numbers, got {shortened(given)}")
    wanted = "finite (allowed_token_ids and bad_words forbid tokens)"
    bias = {}
    for key, value in given.items():
        token_id = read_int("logit_bias token id", key, 0)
        if token_id in bias:
            raise ValueError(f"logit_bias has token id {token_id} twice")
        bias[token_id] = read_number(f"logit_bias[{token_id}]", value, -FLOAT32_MAX, FLOAT32_MAX, wanted)
    return bias


def _read_processors(given: object) -> Sequence[object]:
    processors = read_list("logits_processors", given, "callables")
    for processor in processors:
        if not callable(processor):
            raise ValueError(f"logits_processors must be callables, got {shortened(processor)}")
        try:
            hash(processor)
        except TypeError:
            raise ValueError(
                f"logits_processors has {shortened(processor)}, which has no hash: programs are found again by it"
            ) from None
    return processors


def read_text_flags(params: RequestParams) -> None:
    read_flags(params, "include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens")
    if not params.detokenize and params.stop_strings:
        raise ValueError("stop strings are looked for in the text: they need detokenize=True")


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """One string, several or none, as a tuple."""
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def check_token_ids(params: RequestParams, vocab_size: int) -> None:
    """Raise ValueError where a token id is outside the vocabulary of the model that is about to run."""
    named = {
        "stop_token_ids": params.stop_token_ids or (),
        "allowed_token_ids": params.allowed_token_ids or (),
        "logit_bias": params.logit_bias or (),
    }
    for name, token_ids in named.items():
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise ValueError(
                    f"{name} has token id {shortened(token_id)}; the vocabulary has ids 0 to {vocab_size - 1}"
                )
        if len(token_ids) > vocab_size:
            raise ValueError(f"{name} has {len(token_ids)} token ids, of a vocabulary of {vocab_size}")
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name) or 0) > vocab_size:
            raise ValueError(f"{name}={getattr(params, name)} exceeds the vocabulary of {vocab_size}: use -1 for all")
