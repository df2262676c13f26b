"""Checks of values that came out of JSON, shared by the two kinds of JSON lines."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from jaxpaged.api.values import shortened


def parse_object(text: str) -> tuple[dict[str, Any], list[str]]:
    """A line's object, and the keys that it has twice in some object: of these, JSON does not say which is meant."""
    repeated: list[str] = []
    try:
        parsed = json.loads(text, object_pairs_hook=pairs_hook(repeated))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets thousands deep
        raise ValueError(f"JSON that cannot be read: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"not a JSON object but {shortened(parsed)}: every line of this file needs to be an object")
    return parsed, repeated


def pairs_hook(repeated: list[str]) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """Makes objects for Python's JSON, and notes in `repeated` the keys that one has twice."""

    def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            repeated.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return made

    return make_object


def check_keys(values: dict[str, Any], known: Iterable[str], what: str = "key") -> None:
    known = tuple(known)
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"unknown {what} {shortened(unknown[0])}; known are {', '.join(known)}")


def is_id(value: object) -> bool:
    return type(value) in (str, int)


def is_token_list(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def bias_from_json(bias: Any) -> Any:
    """JSON has only strings as keys; what is no integer as JSON writes them is left for `SamplingParams` to refuse."""
    if not isinstance(bias, dict):
        return bias
    return {int(key) if re.fullmatch(r"0|-?[1-9][0-9]{0,17}", key) else key: value for key, value in bias.items()}
