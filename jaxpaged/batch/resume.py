"""Which rows of an earlier run still stand. Reads only; the caller changes the file.

A row stands when its fingerprint is that of its input line now. A *result* that does not stand means that the output is
of another input or model: the run is refused, nothing is thrown away. An *error* that does not stand is stale: its row
is dropped and the line tried again. So are errors of lines that were mended, or run with another option; those of lines
that failed while they ran; and rows with NaN, which version 0.1.0 wrote for these. Bytes behind the last newline are a
row that was cut off.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxpaged.batch.changes import describe_change
from jaxpaged.batch.requests import BatchRequest, InvalidLine
from jaxpaged.batch.rows import ROW_START

REMEDY = "choose another output, or say --overwrite to start anew"


@dataclass
class EarlierRun:
    """What an output file holds."""

    finished: set[int] = field(default_factory=set)  # indices of lines with a result
    failed: set[int] = field(default_factory=set)  # indices of lines whose error still stands
    stale: list[tuple[int, int]] = field(default_factory=list)  # byte ranges of rows to drop
    length: int = 0  # bytes up to the last newline

    @property
    def done(self) -> set[int]:
        return self.finished | self.failed


def read_earlier_run(path: Path, lines: Iterable[BatchRequest | InvalidLine]) -> EarlierRun:
    """Raises ValueError, naming the row, where the file is not an earlier run of these lines."""
    by_index = {line.index: line for line in lines}
    earlier = EarlierRun()
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                _check_torn_row(raw, f"{path} line {number}")
                break
            _account(earlier, raw, f"{path} line {number}", by_index)
            earlier.length += len(raw)
    return earlier


def _account(earlier: EarlierRun, raw: bytes, place: str, by_index: dict[int, BatchRequest | InvalidLine]) -> None:
    row = _parse_row(raw, place)
    index = row["index"]
    if index in earlier.done:
        raise ValueError(f"{place}: a second row of input line {index + 1}: {REMEDY}")
    line = by_index.get(index)
    if row.get("error") is not None or _has_nan(raw):
        if line is not None and row["fingerprint"] == line.error_fingerprint:
            earlier.failed.add(index)
        else:
            earlier.stale.append((earlier.length, earlier.length + len(raw)))
    elif isinstance(line, BatchRequest) and row["fingerprint"] == line.fingerprint:
        earlier.finished.add(index)
    else:
        raise ValueError(
            f"{place}: the result of input line {index + 1} does not stand: {describe_change(row, line)}: {REMEDY}"
        )


def _parse_row(raw: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(raw)
        if isinstance(row, dict) and type(row["index"]) is int and isinstance(row["fingerprint"], str):
            return row
    except (ValueError, KeyError, RecursionError):
        pass
    raise ValueError(f"{place}: not a row that jaxpaged wrote: {REMEDY}")


def _has_nan(raw: bytes) -> bool:
    """Whether a row of JSON has numbers that JSON has no word for."""
    found: list[str] = []
    if b"NaN" in raw or b"Infinity" in raw:  # perhaps within a text
        json.loads(raw, parse_constant=found.append)
    return bool(found)


def _check_torn_row(raw: bytes, place: str) -> None:
    """A row cut off by a kill is a beginning of a row; after a power cut, file systems may leave zeros in its place."""
    torn = raw.rstrip(b"\0")
    if torn.endswith(b"}") and _is_json(torn):  # cut off before its newline, or the last line of somebody's file
        _parse_row(torn, place)
    elif not (torn.startswith(ROW_START) or ROW_START.startswith(torn)):
        raise ValueError(f"{place}: not a row that jaxpaged wrote: {REMEDY}")


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return True
