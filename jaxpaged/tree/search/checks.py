"""What searches check of their arguments before they make a node; what a tree is given, the tree checks itself."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np


def read_counts(**counts: Any) -> list[int]:
    """The arguments, each of which must be an integer of at least 1."""
    return [_read_count(name, count) for name, count in counts.items()]


def _read_count(name: str, count: Any) -> int:
    try:
        number = operator.index(count)
    except TypeError:
        raise ValueError(f"{name} must be an integer of at least 1, got {count!r:.60}") from None
    if isinstance(count, bool) or number < 1:
        raise ValueError(f"{name} must be at least 1, got {count!r:.60}")
    return number


def random_numbers(seed: Any) -> np.random.Generator:
    """The generator of a seed, or the one that was given."""
    try:
        return np.random.default_rng(seed)
    except (TypeError, ValueError):
        raise ValueError(f"seed must be an integer of at least 0 or a numpy Generator, got {seed!r:.60}") from None


def read_end_ids(given: Any, own: Collection[int]) -> frozenset[int]:
    """The ids that end a continuation: those given, or else the model's."""
    if given is None:
        return frozenset(own)
    if not isinstance(given, Iterable) or isinstance(given, str | bytes):
        raise ValueError(f"end_ids must be token ids, got {given!r:.60}")
    try:
        return frozenset(operator.index(token_id) for token_id in given)
    except TypeError:
        raise ValueError(f"end_ids must be token ids, got {given!r:.60}") from None


def check_finite(**values: Any) -> None:
    for name, value in values.items():
        is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not is_number or not abs(value) < float("inf"):
            raise ValueError(f"{name} must be a finite number, got {value!r:.60}")
