"""Which column of a row, or key of an object, is the prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxpaged.api.values import shortened

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
#: Where a prompt is looked for that nobody names: one of the first, else the last.
DEFAULT_COLUMNS = (*PROMPT_KEYS, "text")
MAX_NAMED = 20


def prompt_column(values: Mapping[str, Any], column: str | None, flag: str, what: str = "row") -> str:
    """The name under which a row has its prompt; ValueError where it has none there, or several to choose from.

    `flag`: how the user says which.
    """
    if column is not None:
        if values.get(column) is None:
            raise ValueError(f"it has no {shortened(column)}; it has {named(list(values))}")
        return column
    found = [key for key in PROMPT_KEYS if values.get(key) is not None]
    if not found and values.get("text") is not None:
        return "text"
    if len(found) != 1:
        has = " and ".join(found) or "none of them"
        raise ValueError(
            f"give one of prompt, prompt_token_ids and messages, or say which it is with {flag}; the {what} has {has}"
        )
    return found[0]


def check_columns(names: Sequence[str], column: str | None, flag: str, hint: str = "") -> None:
    """ValueError, before any row, for a table without the column that is asked for, or one that is known."""
    there = f"the columns are {named(names)}{hint}"
    if column is not None and column not in names:
        raise ValueError(f"there is no column {shortened(column)}; {there}")
    if column is None and not set(DEFAULT_COLUMNS) & set(names):
        raise ValueError(
            f"no column is called {', '.join(DEFAULT_COLUMNS[:-1])} or {DEFAULT_COLUMNS[-1]}; {there}: "
            f"say which has the prompts with {flag}"
        )


def is_messages(prompt: Any) -> bool:
    """Whether a prompt, under whatever name, is a conversation."""
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(message, Mapping) for message in prompt)


def named(names: Iterable[str]) -> str:
    """Columns, in a message."""
    names = list(names)
    if not names:
        return "none"
    shown = ", ".join(shortened(str(name))[1:-1] for name in names[:MAX_NAMED])
    return shown + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")
