"""Requests to measure with, without a download: lengths of prompts and outputs drawn from published distributions.

    workload = make_workload("sharegpt", 1000, seed=0)            # all at once
    workload = make_workload("alpaca", 1000, seed=0, rate=20.0)   # Poisson arrivals, 20 requests a second

A workload is arrays of lengths and arrival times, so the same one serves a simulation, an engine, or another system.
The same name, number and seed give the same requests. Each function of `WORKLOADS` says what it is fitted to.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpaged.api.values import as_int, as_number, shortened


class Workload(NamedTuple):
    """N requests in order of arrival. The output lengths are forced: end of sequence is to be ignored."""

    prompt_lens: np.ndarray  # i32[N] tokens
    output_lens: np.ndarray  # i32[N] tokens, at least 1
    arrivals: np.ndarray  # f64[N] seconds

    @property
    def max_len(self) -> int:
        """Tokens of the longest request, its output included."""
        return int((self.prompt_lens + self.output_lens).max(initial=0))


#: Their lengths and times are kept in memory.
MAX_REQUESTS = 10_000_000
#: Lengths are 32 bits.
MAX_LEN = 2**30

Lengths = tuple[np.ndarray, np.ndarray]

_PERCENTS = (
    0, 1, 2, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 80, 85, 90, 92.5, 95, 97.5, 99, 99.5, 100,
)  # fmt: skip
_SHAREGPT_PROMPTS = (
    1, 2, 3, 7, 9, 11, 13, 15, 18, 21, 24, 29, 35, 44, 55, 71, 94, 133, 203, 324, 506, 654, 863, 1146, 1460, 1636, 2028,
)  # fmt: skip
_SHAREGPT_OUTPUTS = (
    1, 4, 10, 22, 45, 75, 101, 128, 157, 188, 216, 244, 271, 300, 330, 364, 405, 458, 525, 619, 754, 799, 899, 1092,
    1280, 1443, 2009,
)  # fmt: skip


def sharegpt(rng: np.random.Generator, count: int) -> Lengths:
    """ShareGPT conversations as the vLLM paper used them (means 161 and 338; Kwon et al. 2023, Figure 11).

    Fitted to the 79,725 pairs of its artifact with a sum below 2,048, by 27 points of each cumulative distribution with
    straight lines between them; prompts and outputs are drawn apart (their correlation is 0.04). Means come out at
    about 152 and 337.
    """
    share = np.array(_PERCENTS) / 100
    return (
        np.rint(np.interp(rng.random(count), share, _SHAREGPT_PROMPTS)),
        np.rint(np.interp(rng.random(count), share, _SHAREGPT_OUTPUTS)),
    )


def alpaca(rng: np.random.Generator, count: int) -> Lengths:
    """Instructions like Alpaca's: short prompts (mean 19.31), exponential outputs (mean 58.45).

    The means are printed in the vLLM paper's Figure 11; the shapes (log-normal with sigma 0.5, exponential) were chosen
    because they come near its batch sizes (Figure 13b). They are not fitted to data.
    """
    return _lognormal(rng, count, 19.31, 0.5), np.ceil(rng.exponential(58.45, count))


def alpaca_lognormal(rng: np.random.Generator, count: int) -> Lengths:
    """As `alpaca`, with log-normal outputs (sigma 1.0) and prompts of sigma 0.4.

    With the same printed means, this shape comes near the paper's memory savings (Figure 15); no single shape comes
    near both figures. Not fitted to data.
    """
    return _lognormal(rng, count, 19.31, 0.4), np.maximum(1, np.rint(_lognormal(rng, count, 58.45, 1.0)))


def azure_code(rng: np.random.Generator, count: int) -> Lengths:
    """Azure's 2023 trace of code completion: long prompts, short outputs (8,819 requests, means 2,048 and 28).

    Log-normal, by the mean and deviation of the logarithms: prompts 6.999 and 1.360, outputs 2.788 and 0.847. The real
    prompts end at about 7,500 tokens, which a log-normal does not.
    """
    return rng.lognormal(6.999, 1.360, count), rng.lognormal(2.788, 0.847, count)


def azure_chat(rng: np.random.Generator, count: int) -> Lengths:
    """Azure's 2023 trace of conversations (19,366 requests, means 1,155 and 211).

    Log-normal, by the mean and deviation of the logarithms: prompts 6.633 and 0.985, outputs 5.019 and 0.859.
    """
    return rng.lognormal(6.633, 0.985, count), rng.lognormal(5.019, 0.859, count)


def translation(rng: np.random.Generator, count: int) -> Lengths:
    """Sentences to be translated, as WMT16's from English to German: means of 30 and 40 tokens.

    Both log-normal with sigma 0.5, and drawn apart. Means and shape are assumptions about the sentences of the vLLM
    paper's Figure 16, whose lengths it does not print. They are not fitted to data.
    """
    return _lognormal(rng, count, 30, 0.5), _lognormal(rng, count, 40, 0.5)


WORKLOADS: dict[str, Callable[[np.random.Generator, int], Lengths]] = {
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "alpaca-lognormal": alpaca_lognormal,
    "azure-code": azure_code,
    "azure-chat": azure_chat,
    "translation": translation,
}


def exponential(prompt_len: int, mean: float, cap: int) -> Callable[[np.random.Generator, int], Lengths]:
    """Anyscale's continuous-batching benchmark: prompts of one length, exponential outputs redrawn until at most `cap`.

    Theirs are prompts of 512 tokens, a mean of 128 before the cap, and caps of 32, 128, 512 and 1,536.
    """

    def draw(rng: np.random.Generator, count: int) -> Lengths:
        outputs = np.rint(rng.exponential(mean, count))
        while (beyond := outputs > cap).any():
            outputs[beyond] = np.rint(rng.exponential(mean, beyond.sum()))
        return np.full(count, float(prompt_len)), outputs

    return draw


def fixed(prompt_len: int, output_len: int) -> Callable[[np.random.Generator, int], Lengths]:
    """Every request the same."""
    return lambda rng, count: (np.full(count, float(prompt_len)), np.full(count, float(output_len)))


def make_workload(
    name: str, count: int, seed: int = 0, rate: float | None = None, max_len: int | None = 2048
) -> Workload:
    """`count` requests of a workload; with `rate` (requests a second) Poisson arrivals, without it all arrive at 0.

    `name` is one of `WORKLOADS`, or "exponential:PROMPT:MEAN:CAP", "fixed:PROMPT:OUTPUT", in tokens. Requests whose
    prompt and output together reach `max_len` are drawn again, as the vLLM paper's were left out.
    """
    draw = _find(name)
    if count < 1:
        raise ValueError(f"a workload has at least 1 request, got {count}")
    if count > MAX_REQUESTS:
        raise ValueError(f"a workload has at most {MAX_REQUESTS} requests, got {count}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    lengths, arrivals = (np.random.default_rng(part) for part in np.random.SeedSequence(seed).spawn(2))
    prompts, outputs = _draw_below(draw, lengths, count, max_len, name)
    return Workload(prompts, outputs, arrival_times(count, rate, arrivals))


def arrival_times(count: int, rate: float | None, rng: np.random.Generator) -> np.ndarray:
    """Seconds f64[N]: a Poisson process of `rate` requests a second, or zeros: a burst."""
    if rate is None:
        return np.zeros(count)
    if not rate > 0:
        raise ValueError(f"rate must be above 0 requests a second, got {rate}: leave it out for a burst")
    return np.cumsum(rng.exponential(1 / rate, count))


def read_workload(path: str | Path, num_tokens: Callable[[str], int] | None = None) -> Workload:
    """A user's requests, one JSON object a line, with `output_len` (or `max_tokens`) and one of `prompt_len`,
    `prompt_token_ids`, `prompt`; and, where they come over time, `arrival` in seconds.

    `num_tokens` counts the tokens of a text prompt. Raises ValueError with the line that cannot be read.
    """
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append(_read_request(json.loads(line), num_tokens))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not rows:
        raise ValueError(f"{path} has no requests")
    rows.sort(key=lambda row: row[2])
    prompts, outputs, arrivals = zip(*rows, strict=True)
    return Workload(np.array(prompts, np.int32), np.array(outputs, np.int32), np.array(arrivals, np.float64))


def _read_request(values: Any, num_tokens: Callable[[str], int] | None) -> tuple[int, int, float]:
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {type(values).__name__}")
    output_len: Any = values.get("output_len", values.get("max_tokens"))
    arrival = values.get("arrival", 0.0)
    if isinstance(values.get("prompt"), str):
        if num_tokens is None:
            raise ValueError("a prompt of text needs a tokenizer to count its tokens: give prompt_len instead")
        prompt_len: Any = num_tokens(values["prompt"])
    else:
        ids = values.get("prompt_token_ids")
        prompt_len = len(ids) if isinstance(ids, list) else values.get("prompt_len")
    for key, value in (("prompt_len", prompt_len), ("output_len", output_len)):
        if (as_int(value) or 0) < 1:
            raise ValueError(f"{key} must be an integer of at least 1, got {shortened(value)}")
        if value > MAX_LEN:
            raise ValueError(f"{key} must be at most {MAX_LEN}, got {shortened(value)}")
    seconds = as_number(arrival)
    if seconds is None or not 0 <= seconds < float("inf"):
        raise ValueError(f"arrival must be seconds from 0 on, got {shortened(arrival)}")
    return prompt_len, output_len, float(seconds)


def _find(name: str) -> Callable[[np.random.Generator, int], Lengths]:
    if name in WORKLOADS:
        return WORKLOADS[name]
    kind, *parts = name.split(":")
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if numbers and max(numbers) > MAX_LEN:
        raise ValueError(f"workload {name[:60]!r}: lengths are at most {MAX_LEN} tokens")
    if kind == "exponential" and len(numbers) == 3 and min(numbers) > 0:
        return exponential(*numbers)
    if kind == "fixed" and len(numbers) == 2 and min(numbers) > 0:
        return fixed(*numbers)
    raise ValueError(
        f"unknown workload {shortened(name)}; choose one of {', '.join(WORKLOADS)}, exponential:PROMPT:MEAN:CAP "
        "or fixed:PROMPT:OUTPUT (tokens, at least 1)"
    )


def _draw_below(
    draw: Callable[[np.random.Generator, int], Lengths],
    rng: np.random.Generator,
    count: int,
    max_len: int | None,
    name: str,
) -> Lengths:
    prompts, outputs = np.empty(0, np.int32), np.empty(0, np.int32)
    drawn = 0
    while len(prompts) < count:
        pairs = [np.maximum(1, np.rint(lengths)).astype(np.int32) for lengths in draw(rng, count)]
        drawn += count
        is_kept = np.ones(count, bool) if max_len is None else pairs[0] + pairs[1] < max_len
        prompts, outputs = np.append(prompts, pairs[0][is_kept]), np.append(outputs, pairs[1][is_kept])
        if drawn >= 1000 * max(len(prompts), 1):
            raise ValueError(
                f"fewer than 1 in 1000 requests of {name!r} are shorter than max_len={max_len}: raise max_len"
            )
    return prompts[:count], outputs[:count]


def _lognormal(rng: np.random.Generator, count: int, mean: float, sigma: float) -> np.ndarray:
    return rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
