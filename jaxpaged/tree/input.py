"""The forms in which tokens are handed to a tree, read into one list of ids a node."""

from __future__ import annotations

from typing import Any

from jaxpaged.api.values import as_int, is_list, shortened, unpacked


def read_tokens(what: str, tokens: Any, count: int, is_single: bool) -> list[list[int]]:
    """One id a node, or a list of ids a node; for a single node also an id or a list of ids, as it is."""
    tokens = unpacked(tokens)
    if is_single:
        return [_row(what, [tokens] if _is_id(tokens) else tokens, "the node")]
    _check_list(what, tokens)
    if len(tokens) != count:
        raise ValueError(f"{what}: tokens for {len(tokens)} nodes, but {count} nodes: give an id or a list for each")
    return [_row(what, [row] if _is_id(row) else row, f"node {i} of the call") for i, row in enumerate(tokens)]


def read_continuations(continuations: Any, count: int, is_single: bool) -> list[list[int]]:
    """Lists of ids: any number of them for a single node (a flat list is one), else as many as nodes."""
    continuations = unpacked(continuations)
    _check_list("score", continuations)
    if is_single and continuations and all(_is_id(x) for x in continuations):
        continuations = [continuations]
    if not is_single and len(continuations) != count:
        raise ValueError(f"score: {len(continuations)} continuations for {count} nodes: give one for each")
    return [_row("score", row, f"continuation {i}") for i, row in enumerate(continuations)]


def read_ids(what: str, tokens: Any, whose: str = "") -> list[int]:
    """A list of ids, which may be empty; `whose` they are, for messages."""
    tokens = unpacked(tokens)
    _check_list(what, tokens)
    for token_id in tokens:
        if as_int(token_id) is None:
            raise ValueError(f"{what}: token ids are integers, got {shortened(token_id)}{whose and ' for ' + whose}")
    return [as_int(token_id) for token_id in tokens]  # type: ignore[misc]


def _row(what: str, row: Any, whose: str) -> list[int]:
    ids = read_ids(what, row, whose)
    if not ids:
        raise ValueError(f"{what}: no tokens for {whose}: give at least one")
    return ids


def _check_list(what: str, values: Any) -> None:
    if isinstance(values, str):
        raise ValueError(f"{what} takes token ids, got text: tree.encode(node, text) gives its ids")
    if not is_list(values):
        raise ValueError(f"{what} takes token ids, one or a list of them for each node, got {shortened(values)}")


def _is_id(value: Any) -> bool:
    return as_int(value) is not None
