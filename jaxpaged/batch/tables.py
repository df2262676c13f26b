"""`.csv`, `.tsv` and `.parquet` -> records: one a row, its values by the names of the columns.

What a row of text holds is text, but for columns that have a meaning: there numbers, true, false and JSON are read. An
empty cell says nothing there. What cannot be read of a row is that row's problem.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from jaxpaged.api.prompt_columns import named
from jaxpaged.api.values import shortened
from jaxpaged.batch.input_formats import need_pyarrow
from jaxpaged.batch.records import Record, cut_record, not_utf8

DELIMITERS = {"csv": ",", "tsv": "\t"}
NEVER_CLOSED = "unexpected end of data"  # as the csv module says it
TEXTS = ("stop", "bad_words")
BATCH_ROWS = 1024


def text_table(data: bytes, file_format: str, cut: str | None) -> tuple[list[str], Iterator[list[str] | str]]:
    """Its columns, and of each row the cells, or what is wrong with it. `cut`: the data ends early."""
    text = data.decode("utf-8", "surrogateescape")
    if cut is not None:  # the last line may be a part of one
        text = text[: text.rfind("\n") + 1]
    rows = _cells(text, DELIMITERS[file_format])
    header = next(rows, [])
    if isinstance(header, str):
        raise ValueError(f"the names of its columns cannot be read: {header}")
    if problem := not_utf8("".join(header)):
        raise ValueError(f"the names of its columns are {problem}")
    names = [name.strip() or f"column_{place}" for place, name in enumerate(header, start=1)]
    check_names(names)
    return names, rows


def _cells(text: str, delimiter: str) -> Iterator[list[str] | str]:
    with _cells_of_any_length(len(text)):
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                more = ": a quote is opened and never closed" if str(error) == NEVER_CLOSED else ""
                yield f"{error}{more} (line {line} of the file)"
            else:
                if row:
                    yield row


@contextlib.contextmanager
def _cells_of_any_length(length: int) -> Iterator[None]:
    """The csv module refuses cells of more than 128 KiB, unless it is told otherwise."""
    before = csv.field_size_limit(max(csv.field_size_limit(), length + 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def text_records(
    names: Sequence[str], rows: Iterator[list[str] | str], read_as_json: Collection[str], cut: str | None
) -> Iterator[Record]:
    """`read_as_json`: the columns that have a meaning other than text."""
    index = -1
    for index, row in enumerate(rows):
        if isinstance(row, list):
            yield _text_record(index, names, row, read_as_json)
        elif cut is None or not row.startswith(NEVER_CLOSED):
            yield Record(index, row, problem=row)
        else:
            index -= 1
    if cut is not None:
        yield cut_record(index + 1, cut, "row")


def _text_record(index: int, names: Sequence[str], row: list[str], read_as_json: Collection[str]) -> Record:
    cells = dict(zip(names, row, strict=False))
    problem = None
    if len(row) != len(names):
        problem = f"{len(row)} cells, and there are {len(names)} columns: {named(names)}"
    for name, cell in cells.items():
        if wrong := not_utf8(cell):
            problem = f"{wrong} of {shortened(name)}"
    values = {name: _meant(name, cell) if name in read_as_json else cell for name, cell in cells.items()}
    return Record(index, json.dumps(row), values=values, problem=problem)


def _meant(name: str, cell: str) -> Any:
    """What a cell of a parameter says; what is no JSON is text, and so is what may be text or a list of it."""
    if not cell.strip():
        return None
    if name in TEXTS and not cell.lstrip().startswith("["):
        return cell
    word = cell.strip().lower()
    if word in ("true", "false"):
        return word == "true"
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell


def parquet_table(data: bytes) -> tuple[list[str], Iterator[dict[str, Any] | str]]:
    """Its columns, and each row, or what is wrong with all that are left. ValueError where it cannot be read at all."""
    need_pyarrow("a .parquet file")
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        names = file.schema_arrow.names
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"not a whole Parquet file, since its end is missing or damaged: {_brief(error)}") from None
    check_names(names)
    return names, _parquet_rows(file)


def _parquet_rows(file: Any) -> Iterator[dict[str, Any] | str]:
    import pyarrow

    try:
        for group in range(file.num_row_groups):  # one by one, so that damage to one leaves those before
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group]):
                columns = [_plain_times(column).to_pylist() for column in batch.columns]
                for row in zip(*columns, strict=True):
                    yield dict(zip(batch.schema.names, row, strict=True))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        yield f"the Parquet data is damaged ({_brief(error)})"


def _plain_times(column: Any) -> Any:
    """Times to the microsecond, which is as far as Python's go."""
    import pyarrow

    for is_kind, make in (
        (pyarrow.types.is_timestamp, lambda kind: pyarrow.timestamp("us", kind.tz)),
        (pyarrow.types.is_duration, lambda _: pyarrow.duration("us")),
        (pyarrow.types.is_time64, lambda _: pyarrow.time64("us")),
    ):
        if is_kind(column.type):
            return column.cast(make(column.type), safe=False)
    return column


def parquet_records(rows: Iterator[dict[str, Any] | str]) -> Iterator[Record]:
    for index, row in enumerate(rows):
        if isinstance(row, str):
            yield cut_record(index, row, "row")
        else:
            yield Record(index, repr(row), values=row)


def check_names(names: Sequence[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two columns are called {shortened(twice[0])}: give each a name of its own")


def without_nothing(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a row as a line of JSON would have them: nothing where a cell is empty, whole numbers as such.

    Tables keep a column of whole numbers as floats where one of them is missing, and what is missing as NaN.
    """
    kept = {name: value for name, value in values.items() if value is not None}
    for name, value in list(kept.items()):
        if isinstance(value, float) and math.isnan(value):
            del kept[name]
        elif isinstance(value, float) and value.is_integer():
            kept[name] = int(value)
    return kept


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
