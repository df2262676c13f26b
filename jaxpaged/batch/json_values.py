"""Checks of values that came out of JSON, shared by the two kinds of JSON lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any


def parse_object(text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets thousands deep
        raise ValueError(f"JSON that cannot be read: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"not a JSON object but {shortened(parsed)}: every line of this file needs to be an object")
    return parsed


def check_keys(values: dict[str, Any], known: Iterable[str], what: str = "key") -> None:
    known = tuple(known)
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"unknown {what} {shortened(unknown[0])}; known are {', '.join(known)}")


def check_encodable(text: str, name: str) -> None:
    """JSON can spell half of a surrogate pair, which no tokenizer and no file takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has a character that is not Unicode text, {text[error.start]!r}") from None


def is_id(value: object) -> bool:
    return type(value) in (str, int)


def is_token_list(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def bias_from_json(bias: Any) -> Any:
    """JSON has only strings as keys; a key that is no integer is left for `SamplingParams` to refuse."""
    if not isinstance(bias, dict):
        return bias
    return {int(key) if re.fullmatch(r"-?[0-9]{1,18}", key) else key: value for key, value in bias.items()}


def shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
