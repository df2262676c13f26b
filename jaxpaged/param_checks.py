"""The checks that `SamplingParams` and `BeamSearchParams` share: values of one kind, and fields that both have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxpaged.beam_params import RequestParams


def check_int(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_number(name: str, value: object, low: float, high: float, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not low <= value <= high or (value == math.inf and wanted.endswith("finite")):
        raise ValueError(f"{name} must be {wanted}, got {value}")


def check_list(name: str, values: object, kind: type, what: str) -> None:
    if values is None:
        return
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{name} must be a list of {what}, got {values!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ValueError(f"{name} must be a list of {what}, but has {value!r}")


def check_flags(params: RequestParams, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(params, name), bool):
            raise ValueError(f"{name} must be True or False, got {getattr(params, name)!r}")


def check_counts(params: RequestParams) -> None:
    """max_tokens, min_tokens, seed, logprobs, prompt_logprobs."""
    if params.max_tokens is not None:
        check_int("max_tokens", params.max_tokens, 1)
    check_int("min_tokens", params.min_tokens, 0)
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise ValueError(f"min_tokens={params.min_tokens} exceeds max_tokens={params.max_tokens}")
    if params.seed is not None:
        check_int("seed", params.seed, 0)
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(params, name) is not None:
            check_int(name, getattr(params, name), -1)


def check_penalties(params: RequestParams) -> None:
    """repetition_penalty, presence_penalty, frequency_penalty."""
    check_number("repetition_penalty", params.repetition_penalty, 0.0, math.inf, "above 0, and finite")
    if params.repetition_penalty == 0:
        raise ValueError("repetition_penalty must be above 0, got 0: 1 means no penalty")
    for name in ("presence_penalty", "frequency_penalty"):
        check_number(name, getattr(params, name), -2.0, 2.0, "in [-2, 2]")


def check_lists(params: RequestParams, what: str) -> None:
    """What ends the output and which tokens may be in it; `what` is the plain word for one output, in messages."""
    if params.stop is not None and not isinstance(params.stop, str):
        check_list("stop", params.stop, str, "strings")
    if "" in params.stop_strings:
        raise ValueError(f"stop contains an empty string, which would end every {what} at once")
    check_list("bad_words", params.bad_words, str, "strings")
    if params.bad_words and "" in params.bad_words:
        raise ValueError("bad_words contains an empty string")
    for name in ("stop_token_ids", "allowed_token_ids"):
        check_list(name, getattr(params, name), int, "token ids")
    if params.allowed_token_ids is not None and len(params.allowed_token_ids) == 0:
        raise ValueError("allowed_token_ids is empty: no token could be chosen")
    if params.logit_bias is not None:
        if not isinstance(params.logit_bias, Mapping):
            raise ValueError(f"logit_bias must map token ids to numbers, got {params.logit_bias!r}")
        for token_id, bias in params.logit_bias.items():
            check_int("logit_bias token id", token_id, 0)
            check_number(f"logit_bias[{token_id}]", bias, -math.inf, math.inf, "a number")
    for processor in params.logits_processors or ():
        if not callable(processor):
            raise ValueError(f"logits_processors must be callables, got {processor!r}")


def check_text(params: RequestParams) -> None:
    check_flags(params, "include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens")
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
                raise ValueError(f"{name} has token id {token_id}; the vocabulary has ids 0 to {vocab_size - 1}")
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name) or 0) > vocab_size:
            raise ValueError(f"{name}={getattr(params, name)} exceeds the vocabulary of {vocab_size}: use -1 for all")
