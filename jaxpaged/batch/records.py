"""One line or row of an input file, read but not yet looked at: what every kind of file becomes."""

from __future__ import annotations

from typing import Any, NamedTuple


class Record(NamedTuple):
    """A line or row: a text, values by key or column, or why it is neither.

    Where there is a `problem`, `values` are what could be read all the same: an id, say.
    """

    index: int  # from 0
    raw: str  # by which a later run knows it again
    text: str | None = None  # a prompt, and nothing beside it
    values: dict[str, Any] | None = None
    problem: str | None = None


class Records(NamedTuple):
    """Those of a file."""

    records: list[Record]
    unit: str = "line"  # what the file calls one; "row" of what has rows
    is_table: bool = False  # every row has the same columns, and an empty cell says nothing


def cut_record(index: int, cut: str, unit: str) -> Record:
    """What stands for the rest of a file that ends early."""
    return Record(index, cut, problem=f"{cut}: this {unit}, and what may be behind it, cannot be read")


def not_utf8(text: str) -> str | None:
    """What is wrong with text that was decoded with "surrogateescape"; None where nothing is."""
    for column, character in enumerate(text, start=1):
        if 0xDC80 <= ord(character) <= 0xDCFF:
            return f"not UTF-8: byte 0x{ord(character) - 0xDC00:02x} at column {column}"
    return None
