"""Values as people hand them over: read into plain Python ones, or refused with their name.

numpy's numbers and arrays count as what they hold. What is read is a copy, so that the caller's lists may change later.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

#: Sequences to Python, but text or its bytes to people: never a list of token ids.
TEXT_AND_BYTES = (str, bytes, bytearray, memoryview)
FLOAT32_MAX = float(np.finfo(np.float32).max)
#: Most that an integer may be where nothing else limits it.
INT_MAX = 2**63 - 1
#: Seeds are 64 bits on the device: another one would be the same as its rest.
SEED_MAX = 2**64 - 1


class _Brief(reprlib.Repr):
    """Neither depth nor length makes it fail, or slow."""

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 1000 else f"<an integer of {x.bit_length()} bits>"


_BRIEF = _Brief()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 60
_BRIEF.maxlevel = 3


def shortened(value: object) -> str:
    """A value in a message: its repr, cut to what a person reads."""
    text = repr(value[:80]) if isinstance(value, str) else _BRIEF.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def as_int(value: object) -> int | None:
    """The integer that `value` is, in Python or numpy; None for everything else, also for True."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def as_number(value: Any) -> int | float | None:
    """The number that `value` is; None for NaN and for what is none. Beyond the range of floats it is infinite."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # pyright: ignore[reportOperatorIssue]
    if math.isnan(number):
        return None
    return value if type(value) is int else number


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether `value` is a sequence of things, other than text and bytes."""
    return isinstance(value, Sequence) and not isinstance(value, TEXT_AND_BYTES)


def unpacked(value: Any) -> Any:
    """Arrays as lists and numbers; everything else as it is."""
    if hasattr(value, "tolist") and not isinstance(value, (type, *TEXT_AND_BYTES)):
        return value.tolist()
    return value


def read_int(name: str, value: object, low: int, high: int = INT_MAX) -> int:
    number = as_int(value)
    if number is None:
        raise ValueError(f"{name} must be an integer, got {shortened(value)}")
    if number < low:
        raise ValueError(f"{name} must be at least {low}, got {shortened(number)}")
    if number > high:
        raise ValueError(f"{name} must be at most {high}, got {shortened(number)}")
    return number


def read_number(name: str, value: object, low: float, high: float, wanted: str) -> int | float:
    number = as_number(value)
    if number is None:
        raise ValueError(f"{name} must be a number, got {shortened(value)}")
    if not low <= number <= high:
        raise ValueError(f"{name} must be {wanted}, got {shortened(value)}")
    return number


def read_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {shortened(value)}")
    return bool(value)


def read_seed(value: object) -> int:
    number = as_int(value)
    if number is None:
        raise ValueError(f"seed must be an integer, got {shortened(value)}")
    if not 0 <= number <= SEED_MAX:
        raise ValueError(f"seed must be at least 0 and below 2**64, got {shortened(number)}")
    return number


def read_path(name: str, value: object) -> Path:
    """A path that the system can look up, whether or not something is there."""
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes) or not os.fspath(value):
        raise ValueError(f"{name} must be a path, got {shortened(value)}")
    path = Path(value).expanduser()
    try:
        path.exists()
    except OSError as error:
        raise ValueError(f"{name}: {shortened(str(value))} cannot be looked up: {error.strerror}") from None
    return path


def read_list(name: str, values: Any, what: str) -> list[Any] | tuple[Any, ...]:
    """A copy of a list, tuple or array; ValueError for what has no order or is used up by looking at it."""
    if isinstance(values, tuple):
        return values
    values = unpacked(values)
    if not is_list(values):
        hint = ": make a list of it" if hasattr(values, "__iter__") and not isinstance(values, TEXT_AND_BYTES) else ""
        raise ValueError(f"{name} must be a list of {what}, got {shortened(values)}{hint}")
    return list(values)


def read_strings(name: str, values: Any, most: int = INT_MAX) -> list[Any] | tuple[Any, ...]:
    values = read_list(name, values, "strings")
    if len(values) > most:
        raise ValueError(f"{name} has {len(values)} strings, and {most} are possible")
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a list of strings, but has {shortened(value)}")
        check_encodable(value, name)
    return values


def read_token_ids(name: str, values: Any) -> list[int] | tuple[int, ...]:
    read = read_list(name, values, "token ids")
    ids = [as_int(value) for value in read]
    if None in ids:
        raise ValueError(f"{name} must be a list of token ids, but has {shortened(read[ids.index(None)])}")
    return tuple(ids) if isinstance(read, tuple) else ids  # pyright: ignore


def check_encodable(text: str, name: str) -> None:
    """Python and JSON can spell half of a surrogate pair, which no tokenizer and no file takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has a character that is not Unicode text, {text[error.start]!r}") from None
