"""What is filed of one token: its log-probability and rank, and those of the likeliest tokens in its place."""

from __future__ import annotations

import numpy as np

#: token id -> (log-probability, rank); the token itself first.
Entry = dict[int, tuple[float, int]]


def make_entry(
    token_id: int, logprob: float, rank: int, top_ids: np.ndarray, top_logprobs: np.ndarray, count: int
) -> Entry:
    """top_ids i32[k] and top_logprobs f32[k], best first, of which `count` are filed (-1: all)."""
    count = len(top_ids) if count == -1 else count
    entry = {token_id: (float(logprob), int(rank))}
    likeliest = zip(top_ids[:count].tolist(), top_logprobs[:count].tolist(), strict=True)
    for place, (other, other_logprob) in enumerate(likeliest, start=1):
        entry.setdefault(other, (other_logprob, place))
    return entry
