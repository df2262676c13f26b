"""Reads single keys of a Hugging Face file: a value of the right kind, or ValueError with the key and the value."""

from __future__ import annotations

from typing import Any

from jaxpaged.config.checks import MAX_LAYERS, MAX_SIZE, check_flag, check_number, check_size, check_text, short

Values = dict[str, Any]

SIZE_LIMITS = {"num_hidden_layers": MAX_LAYERS}  # of other keys: MAX_SIZE


def read_size(values: Values, key: str, default: int | None = None) -> int:
    """A positive integer; a key that is absent has the `default`, and without one is an error."""
    value = values.get(key, default)
    check_size(key, value, SIZE_LIMITS.get(key, MAX_SIZE))
    return value  # pyright: ignore[reportReturnType]  # check_size refuses None


def read_optional_size(values: Values, key: str, limit: int = MAX_SIZE, default: int | None = None) -> int | None:
    value = values.get(key, default)
    if value is not None:
        check_size(key, value, limit)
    return value


def read_number(values: Values, key: str, default: float, low: float = 0, high: float = float("inf")) -> float:
    value = values.get(key, default)
    check_number(key, value, low, high)
    return value


def read_optional_number(values: Values, key: str, default: float | None = None) -> float | None:
    """A number above 0, or None where it is null."""
    value = values.get(key, default)
    if value is not None:
        check_number(key, value, 0)
    return value


def read_flag(values: Values, key: str, default: bool) -> bool:
    """null is false, as in Python."""
    value = values.get(key, default)
    if value is None:
        return False
    check_flag(key, value)
    return value


def read_text(values: Values, key: str) -> str | None:
    value = values.get(key)
    if value is not None:
        check_text(key, value)
    return value


def read_object(values: Values, key: str) -> Values:
    """A JSON object; {} where it is absent or null."""
    value = values.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be an object, got {short(value)}")
    return value
