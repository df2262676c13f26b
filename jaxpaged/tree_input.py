"""The forms in which tokens are handed to a tree, read into one list of ids a node."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any


def read_tokens(what: str, tokens: Any, count: int, is_single: bool) -> list[list[int]]:
    """One id a node, or a list of ids a node; for a single node also an id or a list of ids, as it is."""
    tokens = _as_list(tokens)
    if is_single:
        return [_row(what, [tokens] if _is_id(tokens) else tokens, "the node")]
    _check_list(what, tokens)
    if len(tokens) != count:
        raise ValueError(f"{what}: tokens for {len(tokens)} nodes, but {count} nodes: give an id or a list for each")
    return [_row(what, [row] if _is_id(row) else row, f"node {i} of the call") for i, row in enumerate(tokens)]


def read_continuations(continuations: Any, count: int, is_single: bool) -> list[list[int]]:
    """Lists of ids: any number of them for a single node (a flat list is one), else as many as nodes."""
    continuations = _as_list(continuations)
    _check_list("score", continuations)
    if is_single and continuations and all(_is_id(x) for x in continuations):
        continuations = [continuations]
    if not is_single and len(continuations) != count:
        raise ValueError(f"score: {len(continuations)} continuations for {count} nodes: give one for each")
    return [_row("score", row, f"continuation {i}") for i, row in enumerate(continuations)]


def _row(what: str, row: Any, whose: str) -> list[int]:
    row = _as_list(row)
    _check_list(what, row)
    if not row:
        raise ValueError(f"{what}: no tokens for {whose}: give at least one")
    for token_id in row:
        if not _is_id(token_id):
            raise ValueError(f"{what}: token ids are integers, got {token_id!r} for {whose}")
    return [int(token_id) for token_id in row]


def _check_list(what: str, values: Any) -> None:
    if isinstance(values, str):
        raise ValueError(f"{what} takes token ids, got text: tree.encode(node, text) gives its ids")
    if not isinstance(values, SequenceOf):
        raise ValueError(f"{what} takes token ids, one or a list of them for each node, got {values!r}")


def _as_list(value: Any) -> Any:
    """Arrays as lists or numbers; everything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_id(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
