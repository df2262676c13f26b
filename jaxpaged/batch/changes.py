"""What differs between a row that an earlier run wrote and its input line now, in words.

A fingerprint says that something differs. Rows in a file have their settings too, by name and readable: what the line,
the flags and the model were, as far as it was not the default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxpaged.api.carried import carried_in
from jaxpaged.batch.requests import BatchRequest, InvalidLine

MAX_NAMED = 4
ABSENT = "the default"
LABELS = {"model": "the model (a digest of its files)", "--tokenizer": "the tokenizer (a digest of its files)"}


def describe_change(row: Mapping[str, Any], line: BatchRequest | InvalidLine | None) -> str:
    """Why the result in `row` is not that of `line`, whose fingerprint is another."""
    if line is None:
        return "the input has no such line now"
    if isinstance(line, InvalidLine):
        return f"the line is not valid now ({line.reason})"
    before, now = _described(row, line)
    changed = [name for name in dict.fromkeys((*before, *now)) if before.get(name) != now.get(name)]
    if "--seed" in changed and "seed" in changed:
        changed.remove("seed")  # it is made of the other
    if changed:
        named = [f"{LABELS.get(n, n)} was {_shown(before, n)}, is {_shown(now, n)}" for n in changed[:MAX_NAMED]]
        return "; ".join(named) + (f"; and {len(changed) - MAX_NAMED} more" if len(changed) > MAX_NAMED else "")
    if "settings" in row:
        return "the line has another prompt now"
    return (
        "its prompt, parameters or model were others; rows of version 0.1.0, for which every file counted that lay "
        "beside a model, do not say which"
    )


def _described(row: Mapping[str, Any], line: BatchRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the row and of the line, with what else rows tell: only what both sides know."""
    settings = row.get("settings")
    has_settings = isinstance(settings, dict)
    before, now = (dict(settings), dict(line.settings)) if has_settings else ({}, {})
    before["form"], now["form"] = ("OpenAI" if "custom_id" in row else "plain"), "OpenAI" if line.is_openai else "plain"
    if before["form"] != now["form"]:
        return before, now
    before["id"], now["id"] = row.get("custom_id" if line.is_openai else "id"), line.id
    if line.is_openai:
        return before, now
    before["seed"], now["seed"] = row.get("seed"), line.params[0].seed
    before |= {f"column {name}": value for name, value in carried_in(row).items()}
    now |= {f"column {name}": value for name, value in line.carried.items()}
    if "--shared-prefix" not in {*before, *now} and has_settings:
        (prompt,) = line.prompts
        name = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
        if not isinstance(prompt, dict):  # of a conversation a row has what its template made of it
            before[name], now[name] = row.get(name), prompt
    return before, now


def _shown(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return ABSENT
    text = json.dumps(settings[name], ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
