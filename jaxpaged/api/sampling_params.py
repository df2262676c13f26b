"""What a user may ask of one request: vLLM's names and meanings, checked when the object is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxpaged.api.checks import (
    check_token_ids,
    read_counts,
    read_int_field,
    read_lists,
    read_number_field,
    read_optional_int,
    read_penalties,
    read_temperature,
    read_text_flags,
    stop_strings,
)

#: `processor(token_ids i32[L], num_tokens i32[], logits f32[V]) -> f32[V]`, traceable by jax: `token_ids` holds the
#: prompt and the output so far, padded with -1 behind the first `num_tokens`. It is traced in each run and compiled
#: into the step. Functions that compute the same share a program from run to run; within a run keep one object.
LogitsProcessor = Callable[[Any, Any, Any], Any]

LOGIT_BIAS_LIMIT = 100.0


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    Numbers and arrays of numpy count as what they hold. Lists are copied.

    Attributes:
        n: samples returned. More than one needs temperature > 0.
        best_of: samples drawn, of which the `n` with the highest cumulative log-probability are returned (default `n`).
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p, top_k, min_p: keep the smallest set of tokens with probability `top_p` in sum; the `top_k` likeliest
            (0 or -1: all); those with at least `min_p` of the likeliest token's probability.
        seed: of this request's random numbers, 0 to 2**64 - 1; None takes one from the `LLM`'s seed and the request's
            number. A sample is a function of (seed, sample index, position) alone.
        max_tokens: tokens generated at most; None means up to the model's length.
        min_tokens: before that many tokens, end-of-sequence and `stop_token_ids` cannot be chosen.
        stop: strings that end a sample; cut from the text unless `include_stop_str_in_output`.
        stop_token_ids: token ids that end a sample, besides the model's end-of-sequence ids.
        ignore_eos: go on past the model's end-of-sequence ids.
        repetition_penalty: > 1 makes tokens of prompt and output less likely (divides positive logits, multiplies
            negative ones); in [0.01, 100].
        presence_penalty, frequency_penalty: in [-2, 2]; subtracted once for, and once per occurrence of, a generated
            token.
        logit_bias: token id -> added to its logit, clamped to [-100, 100].
        allowed_token_ids: only these tokens can be chosen.
        bad_words: strings that are never generated: the last token of each is banned where the others precede it.
        logits_processors: functions of (token ids, their number, logits), in this order, see `LogitsProcessor`.
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
        read_int_field(self, "n", 1)
        read_optional_int(self, "best_of", 1)
        if self.best_of is not None and self.n > self.best_of:
            raise ValueError(f"n={self.n} samples cannot be returned of best_of={self.best_of} drawn: raise best_of")
        read_counts(self)
        read_int_field(self, "top_k", -1)
        self._read_distribution()
        read_penalties(self)
        read_lists(self, "sample")
        read_text_flags(self)

    def _read_distribution(self):
        read_temperature(self, "0 (greedy) or more")
        read_number_field(self, "top_p", 0.0, 1.0, "in (0, 1]")
        if self.top_p == 0:
            raise ValueError("top_p must be in (0, 1], got 0: for greedy decoding use temperature=0")
        read_number_field(self, "min_p", 0.0, 1.0, "in [0, 1]")
        if self.is_greedy and self.num_samples > 1:
            raise ValueError(
                f"temperature=0 gives the same tokens every time, but {self.num_samples} samples were asked for: "
                "set temperature above 0, or n=1 and best_of=1"
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def num_samples(self) -> int:
        """Sequences that run for this request."""
        return self.n if self.best_of is None else self.best_of

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return stop_strings(self.stop)

    def check_token_ids(self, vocab_size: int) -> None:
        """Raise ValueError where a token id is outside the vocabulary of the model that is about to run."""
        check_token_ids(self, vocab_size)
