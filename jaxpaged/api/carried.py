"""What a row has besides its prompt: carried to its result, under its own names."""

from __future__ import annotations

import base64
import math
from collections.abc import Collection, Mapping
from typing import Any

#: The keys of a result that are ours. What a row calls so is called `input_...` in its result.
ROW_KEYS = frozenset(
    (
        "id", "index", "line", "prompt", "prompt_token_ids", "num_prompt_tokens", "outputs", "prompt_logprobs", "seed",
        "fingerprint", "settings", "error", "custom_id", "response",
    )
)  # fmt: skip
MAX_DEPTH = 100
#: How pandas writes what is missing.
MISSING = ("NaT", "<NA>")


def carried_of(values: Mapping[str, Any], used: Collection[str] = ()) -> dict[str, Any]:
    """What is left of a row's values, as JSON has it; ValueError for what cannot be."""
    left = [key for key in values if key not in used]
    return {name: plain_json(values[key]) for name, key in new_names(left, ROW_KEYS).items()}


def new_names(keys: Collection[str], taken: Collection[str]) -> dict[str, str]:
    """The name that each key has in a result, whose own are `taken`: its own, or that with `input_` before it."""
    names: dict[str, str] = {}
    for key in keys:
        name = key
        while name in taken or name in names or (name != key and name in keys):
            name = f"input_{name}"
        names[name] = key
    return names


def plain_json(value: Any, depth: int = 0) -> Any:
    """A value of whatever a table holds as JSON gives it back: times and decimals as text, bytes in base 64, and
    null for numbers that JSON has no word for."""
    if depth > MAX_DEPTH:
        raise ValueError(f"a value is nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain_json(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(inner, depth + 1) for inner in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if hasattr(value, "tolist"):
        return plain_json(value.tolist(), depth + 1)
    text = value.isoformat() if hasattr(value, "isoformat") else str(value)
    return None if text in MISSING else text


def carried_in(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row that was written has carried."""
    return {name: value for name, value in row.items() if name not in ROW_KEYS}
