"""The checks of what a checkpoint's configuration may hold: kinds, signs and plausible sizes, in one voice.

Sizes have limits because a file with one that no model has (a layer count of 10 ** 9) would otherwise be found out by
a loop that does not end or by memory that does not suffice.
"""

from __future__ import annotations

import math

from jaxpaged.config.choices import choices_in_words

MAX_SIZE = 1 << 24  # of widths, vocabularies and positions; float32, in which positions are turned, counts no further
MAX_LAYERS = 10_000
MAX_COUNT = (1 << 31) - 1  # int32: of pages and of a window, which may well be larger than any text

LARGEST = 1e38  # of numbers: float32, in which they are used


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}; {choices_in_words(value, choices)}")


def check_size(name: str, value: object, limit: int = MAX_SIZE) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {short(value)}")
    if value > limit:
        raise ValueError(f"{name} must be at most {limit}, got {short(value)}")


def check_number(name: str, value: object, low: float, high: float = math.inf) -> None:
    """A finite number in [low, high]; with `low` 0 it must be above it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {short(value)}")
    too_low = value <= 0 if low == 0 else value < low
    if too_low or not value <= min(high, LARGEST):  # NaN is neither
        least = "above 0" if low == 0 else f"at least {low:.8g}"
        most = "finite" if high == math.inf else f"at most {high:.8g}"
        raise ValueError(f"{name} must be {least} and {most}, got {short(value)}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {short(value)}")


def check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {short(value)}")


def check_token_id(name: str, value: object, vocab_size: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a token id, got {short(value)}")
    if not 0 <= value < vocab_size:
        raise ValueError(f"{name}: token id {short(value)} is outside the vocabulary of {vocab_size}")


def short(value: object) -> str:
    """`value` as a message shows it: a list of thousands, or an integer of as many digits, helps nobody."""
    if isinstance(value, int) and abs(value) > 10**100:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
