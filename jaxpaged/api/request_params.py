"""What samples and beams are asked with alike: the fields that both kinds of request have, and their checks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxpaged.api.checks import (
    check_ids,
    read_bias,
    read_flags,
    read_int_field,
    read_number_field,
    read_optional_int,
    read_processors,
    settle,
)
from jaxpaged.api.constraint import Constraint, read_constraint
from jaxpaged.api.values import (
    FLOAT32_MAX,
    check_encodable,
    read_seed,
    read_strings,
    read_token_ids,
)

#: `processor(token_ids i32[L], num_tokens i32[], logits f32[V]) -> f32[V]`, traceable by jax: `token_ids` holds the
#: prompt and the output so far, padded with -1 behind the first `num_tokens`. It is traced in each run and compiled
#: into the step. Functions that compute the same share a program from run to run; within a run keep one object.
LogitsProcessor = Callable[[Any, Any, Any], Any]

LOGIT_BIAS_LIMIT = 100.0
#: Beyond these, penalised logits leave the range of float32, and of beams that of their scores.
REPETITION_PENALTY_RANGE = 0.01, 100.0
#: Each is looked for at every token.
MAX_STRINGS = 10_000


@dataclass(frozen=True, kw_only=True)
class RequestParams:
    """What one request may be asked with: a `SamplingParams` or a `BeamSearchParams`, which derive from this.

    Attributes:
        temperature: logits are divided by it before tokens are drawn; 0 takes the likeliest.
        seed: of this request's random numbers, 0 to 2**64 - 1; None takes one from the `LLM`'s seed and the request's
            number.
        max_tokens: tokens generated at most; None means up to the model's length.
        min_tokens: before that many tokens, end-of-sequence and `stop_token_ids` cannot be chosen.
        stop: strings that end the text; cut from it unless `include_stop_str_in_output`.
        stop_token_ids: token ids that end the text, besides the model's end-of-sequence ids.
        include_stop_str_in_output: leave the string of `stop` that ended the text in it.
        ignore_eos: go on past the model's end-of-sequence ids.
        repetition_penalty: > 1 makes tokens of prompt and output less likely (divides positive logits, multiplies
            negative ones); in [0.01, 100].
        presence_penalty, frequency_penalty: in [-2, 2]; subtracted once for, and once per occurrence of, a generated
            token.
        logit_bias: token id -> added to its logit, clamped to [-100, 100].
        allowed_token_ids: only these tokens can be chosen.
        bad_words: strings that are never generated: the last token of each is banned where the others precede it.
        constraint: what the output is to be: a `Trie`, `Regex`, `JsonSchema` or `Grammar` of `jaxpaged.constraints`, or
            an object with one key, as {"regex": "[0-9]+"}. Every output is one of it, or the beginning of one where
            `max_tokens` or something of `stop` ends it sooner.
        logits_processors: functions of (token ids, their number, logits), in this order, see `LogitsProcessor`.
        logprobs: log-probabilities of that many likeliest tokens per generated token, besides the chosen one's; -1 is
            the whole vocabulary.
        prompt_logprobs: the same for every prompt token but the first.
        detokenize: False leaves `text` empty.
        skip_special_tokens: leave special tokens out of `text`.
    """

    temperature: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    constraint: Constraint | Mapping[str, Any] | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __init_subclass__(cls):
        """`help` of a kind of request lists all its fields: first its own, as its docstring ends, then these."""
        if cls.__doc__ and RequestParams.__doc__:
            shared = inspect.cleandoc(RequestParams.__doc__).partition("Attributes:\n")[2]
            cls.__doc__ = f"{inspect.cleandoc(cls.__doc__)}\n{shared}"

    def __post_init__(self):
        raise TypeError("RequestParams is what two kinds of request share: make SamplingParams or BeamSearchParams")

    @property
    def num_samples(self) -> int:
        """Sequences that run for this request."""
        raise NotImplementedError

    @property
    def num_returned(self) -> int:
        """Outputs of this request, the best of those that ran."""
        raise NotImplementedError

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """One string, several or none, as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def check_token_ids(self, vocab_size: int) -> None:
        """Raise ValueError where a token id is outside the vocabulary of the model that is about to run."""
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            check_ids(name, getattr(self, name) or (), vocab_size)
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) > vocab_size:
                raise ValueError(f"{name}={getattr(self, name)} exceeds the vocabulary of {vocab_size}: use -1 for all")

    def _read_counts(self) -> None:
        """max_tokens, min_tokens, seed, logprobs, prompt_logprobs."""
        read_optional_int(self, "max_tokens", 1)
        read_int_field(self, "min_tokens", 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}")
        if self.seed is not None:
            settle(self, "seed", read_seed(self.seed))
        for name in ("logprobs", "prompt_logprobs"):
            read_optional_int(self, name, -1)

    def _read_temperature(self, wanted: str) -> None:
        read_number_field(self, "temperature", 0.0, FLOAT32_MAX, f"{wanted}, and finite in float32")

    def _read_penalties(self) -> None:
        """repetition_penalty, presence_penalty, frequency_penalty."""
        low, high = REPETITION_PENALTY_RANGE
        wanted = f"in [{low:g}, {high:g}], where 1 means no penalty"
        read_number_field(self, "repetition_penalty", low, high, wanted)
        for name in ("presence_penalty", "frequency_penalty"):
            read_number_field(self, name, -2.0, 2.0, "in [-2, 2]")

    def _read_lists(self, what: str) -> None:
        """What ends the output and which tokens may be in it; `what` is the plain word for one output, in messages."""
        self._read_texts(what)
        for name in ("stop_token_ids", "allowed_token_ids"):
            if getattr(self, name) is not None:
                settle(self, name, read_token_ids(name, getattr(self, name)))
        if self.allowed_token_ids is not None and len(self.allowed_token_ids) == 0:
            raise ValueError("allowed_token_ids is empty: no token could be chosen")
        settle(self, "constraint", read_constraint(self.constraint))
        if self.logit_bias is not None:
            settle(self, "logit_bias", read_bias(self.logit_bias))
        if self.logits_processors is not None:
            settle(self, "logits_processors", read_processors(self.logits_processors))

    def _read_texts(self, what: str) -> None:
        if isinstance(self.stop, str):
            check_encodable(self.stop, "stop")
        elif self.stop is not None:
            settle(self, "stop", read_strings("stop", self.stop, MAX_STRINGS))
        if "" in self.stop_strings:
            raise ValueError(f"stop contains an empty string, which would end every {what} at once")
        if self.bad_words is not None:
            settle(self, "bad_words", read_strings("bad_words", self.bad_words, MAX_STRINGS))
            if "" in self.bad_words:
                raise ValueError("bad_words contains an empty string")

    def _read_text_flags(self) -> None:
        read_flags(self, "include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens")
        if not self.detokenize and self.stop_strings:
            raise ValueError("stop strings are looked for in the text: they need detokenize=True")
