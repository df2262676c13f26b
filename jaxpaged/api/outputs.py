"""What comes back: one `RequestOutput` a prompt, with vLLM's fields and an account of the pages that it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxpaged.api.carried import carried_of

LOWEST_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of one token under the model (before temperature, penalties and filters)."""

    logprob: float
    rank: int  # 1 is the likeliest token of the vocabulary
    decoded_token: str | None  # None without a tokenizer


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One sample of a request."""

    index: int
    text: str  # empty without a tokenizer or with detokenize=False
    token_ids: list[int]
    cumulative_logprob: float
    logprobs: list[dict[int, Logprob]] | None
    #: "stop": end-of-sequence, a stop token or a stop string; "length": max_tokens or the model's length; "error": it
    #: could not go on (`RequestOutput.error`), and these are the tokens so far.
    finish_reason: str
    stop_reason: int | str | None  # the stop string or token id; None for the model's own end-of-sequence
    score: float | None = None  # of a finished beam: cumulative_logprob / generated length ** length_penalty

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a row of JSON."""
        row: dict[str, Any] = {
            "index": self.index,
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        }
        if self.score is not None:
            row["score"] = rounded(self.score)
        if self.logprobs is not None or self.score is not None:
            row["cumulative_logprob"] = rounded(self.cumulative_logprob)
        if self.logprobs is not None:
            row["logprobs"] = [_candidates(candidates) for candidates in self.logprobs]
        return row


@dataclass(frozen=True, slots=True)
class NewToken:
    """One more token of a sample, as a function that was given as `on_token` gets it when it has come."""

    request_id: str  # of the output that will have it: the number of the prompt
    sample: int  # of those that are drawn (`best_of`, of which the best come back)
    token_id: int
    #: What is certain of the text by it, often nothing: what may become a stop string waits until it is none, and so
    #: does a part of a character. The pieces of a sample join to its `text`.
    text: str
    finish_reason: str | None  # of the sample, with its last token; where an error ends it, nothing more is told


@dataclass(frozen=True, slots=True)
class KVUsage:
    """What one request cost in pages. "Logical" counts a page once for each sample that reads it.

    Pages of a prefix that the run shares count for each of its requests, since each reads them.
    """

    pages_at_peak: int  # physical pages
    logical_pages_at_peak: int
    pages_shared: int  # most pages saved by sharing at any step: logical minus physical
    pages_copied: int  # copy-on-write
    num_preemptions: int  # each gave up all pages, of all samples
    recomputed_tokens: int  # prefilled again after preemptions
    num_swaps: int  # preemptions after which nothing was recomputed: the pages came back from host memory
    cached_tokens: int = 0  # of the prompt, found in pages of earlier requests, so not computed; not of a shared prefix


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Seconds since the run began."""

    arrival_time: float  # 0 unless the request came with an arrival time: it is there when the run begins
    first_scheduled_time: float
    first_token_time: float
    finished_time: float


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished request: its prompt and its samples, best first when `best_of` drew more than it returns.

    Beams may be fewer than were asked for, where fewer are possible.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    kv: KVUsage
    error: str | None = None  # why the request could not go on; None where all is well
    carried: Mapping[str, Any] = field(default_factory=dict)  # what its row had besides the prompt, by column

    def to_dict(self) -> dict[str, Any]:
        """What a row of `jaxpaged generate` has, but for what only a file needs: plain values, which JSON takes.

        What the row has carried stands beside it, under its names; those that are taken here begin with `input_`.
        """
        row: dict[str, Any] = {"id": self.request_id, "prompt": self.prompt}
        if self.prompt is None:
            row["prompt_token_ids"] = list(self.prompt_token_ids)
        row["num_prompt_tokens"] = len(self.prompt_token_ids)
        row["outputs"] = [sample.to_dict() for sample in self.outputs]
        if self.prompt_logprobs is not None:
            row["prompt_logprobs"] = [_candidates(candidates) for candidates in self.prompt_logprobs]
        if self.error is not None:
            row["error"] = {"message": self.error}
        return {**row, **carried_of(self.carried)}


def rounded(logprob: float) -> float:
    """Float32 has seven digits; more would only make rows longer. JSON has no -inf, so what is below -9999 is that."""
    return max(round(logprob, 6), LOWEST_LOGPROB)


def _candidates(candidates: dict[int, Logprob] | None) -> list[dict[str, Any]] | None:
    if candidates is None:  # the first prompt token
        return None
    return [
        {"token_id": token_id, "token": c.decoded_token, "logprob": rounded(c.logprob), "rank": c.rank}
        for token_id, c in candidates.items()
    ]
