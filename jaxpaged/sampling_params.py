"""What a user may ask of one request: vLLM's names and meanings, checked when the object is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: `processor(token_ids i32[L], num_tokens i32[], logits f32[V]) -> f32[V]`, traceable by jax: `token_ids` holds the
#: prompt and the output so far, padded with -1 behind the first `num_tokens`. It is compiled into the step, so keep
#: one function object for many requests.
LogitsProcessor = Callable[[Any, Any, Any], Any]

LOGIT_BIAS_LIMIT = 100.0


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    Attributes:
        n: samples returned. More than one needs temperature > 0.
        best_of: samples drawn, of which the `n` with the highest cumulative log-probability are returned (default `n`).
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p, top_k, min_p: keep the smallest set of tokens with probability `top_p` in sum; the `top_k` likeliest
            (0 or -1: all); those with at least `min_p` of the likeliest token's probability.
        seed: of this request's random numbers; None takes one from the `LLM`'s seed and the request's number. A sample
            is a function of (seed, sample index, position) alone.
        max_tokens: tokens generated at most; None means up to the model's length.
        min_tokens: before that many tokens, end-of-sequence and `stop_token_ids` cannot be chosen.
        stop: strings that end a sample; cut from the text unless `include_stop_str_in_output`.
        stop_token_ids: token ids that end a sample, besides the model's end-of-sequence ids.
        ignore_eos: go on past the model's end-of-sequence ids.
        repetition_penalty: > 1 makes tokens of prompt and output less likely (divides positive logits, multiplies
            negative ones).
        presence_penalty, frequency_penalty: in [-2, 2]; subtracted once for, and once per occurrence of, a generated
            token.
        logit_bias: token id -> added to its logit, clamped to [-100, 100].
        allowed_token_ids: only these tokens can be chosen.
        bad_words: strings that are never generated: the last token of each is banned where the others precede it.
        logits_processors: functions of (token ids, their number, logits), see `LogitsProcessor`.
        logprobs: log-probabilities of that many likeliest tokens per generated token, besides the chosen one's; -1 is
            the whole vocabulary.
        prompt_logprobs: the same for every prompt token but the first.
        detokenize: False leaves `text` empty.
        skip_special_tokens: leave special tokens out of `text`.
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
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
    logits_processors: Sequence[LogitsProcessor] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self):
        self._check_counts()
        self._check_distribution()
        self._check_lists()
        for name in ("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not self.detokenize and self.stop_strings:
            raise ValueError("stop strings are looked for in the text: they need detokenize=True")

    def _check_counts(self):
        _check_int("n", self.n, 1)
        if self.best_of is not None:
            _check_int("best_of", self.best_of, 1)
            if self.n > self.best_of:
                raise ValueError(
                    f"n={self.n} samples cannot be returned of best_of={self.best_of} drawn: raise best_of"
                )
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1)
        _check_int("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}")
        _check_int("top_k", self.top_k, -1)
        if self.seed is not None:
            _check_int("seed", self.seed, 0)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), -1)

    def _check_distribution(self):
        _check_number("temperature", self.temperature, 0.0, math.inf, "0 (greedy) or more, and finite")
        _check_number("top_p", self.top_p, 0.0, 1.0, "in (0, 1]")
        if self.top_p == 0:
            raise ValueError("top_p must be in (0, 1], got 0: for greedy decoding use temperature=0")
        _check_number("min_p", self.min_p, 0.0, 1.0, "in [0, 1]")
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, "above 0, and finite")
        if self.repetition_penalty == 0:
            raise ValueError("repetition_penalty must be above 0, got 0: 1 means no penalty")
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name), -2.0, 2.0, "in [-2, 2]")
        if self.is_greedy and self.num_samples > 1:
            raise ValueError(
                f"temperature=0 gives the same tokens every time, but {self.num_samples} samples were asked for: "
                "set temperature above 0, or n=1 and best_of=1"
            )

    def _check_lists(self):
        if self.stop is not None and not isinstance(self.stop, str):
            _check_list("stop", self.stop, str, "strings")
        if "" in self.stop_strings:
            raise ValueError("stop contains an empty string, which would end every sample at once")
        _check_list("bad_words", self.bad_words, str, "strings")
        if self.bad_words and "" in self.bad_words:
            raise ValueError("bad_words contains an empty string")
        for name in ("stop_token_ids", "allowed_token_ids"):
            _check_list(name, getattr(self, name), int, "token ids")
        if self.allowed_token_ids is not None and len(self.allowed_token_ids) == 0:
            raise ValueError("allowed_token_ids is empty: no token could be chosen")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise ValueError(f"logit_bias must map token ids to numbers, got {self.logit_bias!r}")
            for token_id, bias in self.logit_bias.items():
                _check_int("logit_bias token id", token_id, 0)
                _check_number(f"logit_bias[{token_id}]", bias, -math.inf, math.inf, "a number")
        for processor in self.logits_processors or ():
            if not callable(processor):
                raise ValueError(f"logits_processors must be callables, got {processor!r}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def num_samples(self) -> int:
        """Sequences that run for this request."""
        return self.n if self.best_of is None else self.best_of

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def check_token_ids(self, vocab_size: int) -> None:
        """Raise ValueError where a token id is outside the vocabulary of the model that is about to run."""
        named = {
            "stop_token_ids": self.stop_token_ids or (),
            "allowed_token_ids": self.allowed_token_ids or (),
            "logit_bias": self.logit_bias or (),
        }
        for name, token_ids in named.items():
            for token_id in token_ids:
                if not 0 <= token_id < vocab_size:
                    raise ValueError(f"{name} has token id {token_id}; the vocabulary has ids 0 to {vocab_size - 1}")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) > vocab_size:
                raise ValueError(f"{name}={getattr(self, name)} exceeds the vocabulary of {vocab_size}: use -1 for all")


def _check_int(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def _check_number(name: str, value: object, low: float, high: float, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not low <= value <= high or (value == math.inf and wanted.endswith("finite")):
        raise ValueError(f"{name} must be {wanted}, got {value}")


def _check_list(name: str, values: object, kind: type, what: str) -> None:
    if values is None:
        return
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{name} must be a list of {what}, got {values!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ValueError(f"{name} must be a list of {what}, but has {value!r}")
