"""An input file -> one request or one error a line or row. How the file is read its name says (input_formats.py), or
`--format`; where both say nothing, its first line.

Then the first line that is not blank decides: if it begins with `{`, every line is a JSON object, and a line that is
not one is an error of that line, never a prompt; otherwise every line is a prompt. Blank lines are skipped and counted.
The line's end, and a byte order mark, are not part of a prompt; other blanks are.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

from jaxpaged.api.prompt_columns import DEFAULT_COLUMNS, PROMPT_KEYS, check_columns, named
from jaxpaged.api.values import shortened
from jaxpaged.batch.input_formats import TABLES, InputFormat, check_beginning
from jaxpaged.batch.json_file import document_records, has_a_line_each
from jaxpaged.batch.json_values import parse_object
from jaxpaged.batch.line_request import FLAG, MEANT, OTHER_KEYS, LineReader, is_openai
from jaxpaged.batch.records import Record, Records, cut_record
from jaxpaged.batch.requests import BatchContext, BatchRequest, InvalidLine
from jaxpaged.batch.spelling import check_spelling
from jaxpaged.batch.tables import parquet_records, parquet_table, text_records, text_table

AUTO = InputFormat("auto")


def parse_batch(
    data: bytes, context: BatchContext, file_format: InputFormat | str = AUTO, cut: str | None = None
) -> list[BatchRequest | InvalidLine]:
    """Every line that is not blank, or every row, in order. Raises ValueError where the file as a whole is of no known
    format. `cut`: why the data ends early, where it does."""
    if isinstance(file_format, str):
        file_format = InputFormat(file_format, is_said=file_format != "auto")
    read = _records(data, file_format, context, cut)
    reader = LineReader(context, read.unit, read.is_table)
    return [reader.read(record) for record in read.records]


def _records(data: bytes, file_format: InputFormat, context: BatchContext, cut: str | None) -> Records:
    if file_format.name == "parquet":
        return _of_parquet(data, context)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("the input is UTF-16: save it as UTF-8")
    if not file_format.is_said:
        check_beginning(data)
    data = data.removeprefix(codecs.BOM_UTF8)
    if file_format.name in TABLES:
        return _of_text_table(data, file_format.name, context, cut)
    if file_format.name == "json":
        text = data.decode("utf-8", "surrogateescape")
        if not has_a_line_each(text):
            records = list(document_records(text, cut))
            _check_key(records, context)
            return Records(records, "row")
        file_format = InputFormat("jsonl")
    return Records(_of_lines(data, file_format, context, cut))


def _of_lines(data: bytes, file_format: InputFormat, context: BatchContext, cut: str | None) -> list[Record]:
    lines = list(_numbered_lines(data))
    if cut is not None:
        whole = data.count(b"\n")  # lines that are there to their end
        lines = [(index, line) for index, line in lines if index < whole]
    if file_format.name == "text" and not file_format.is_said:
        _check_no_json(lines, context)
    if file_format.name == "jsonl" or (file_format.name == "auto" and _looks_like_json(lines)):
        records = [_json_record(index, line) for index, line in lines]
        _check_key(records, context)
    else:
        if context.prompt_column is not None:
            raise ValueError("--prompt-column names a key or a column, and lines of text have none: leave it out")
        records = [_text_record(index, line) for index, line in lines]
    return records if cut is None else [*records, cut_record(data.count(b"\n"), cut, "line")]


def _numbered_lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    for index, line in enumerate(data.split(b"\n")):
        if line.strip():
            yield index, line.removesuffix(b"\r")


def _looks_like_json(lines: list[tuple[int, bytes]]) -> bool:
    first = lines[0][1].strip() if lines else b""
    if first == b"[" or first.startswith(b"[{"):
        raise ValueError(
            "the input is a JSON list: say --format json, or write one object a line (jq -c '.[]'), "
            "or say --format text if its lines are prompts"
        )
    return first.startswith(b"{")


def _check_no_json(lines: list[tuple[int, bytes]], context: BatchContext) -> None:
    """A name that ends in .txt says text; but JSON lines, which were read as such once, are not meant as prompts."""
    values = _json_record(*lines[0]).values if lines else None
    if values and (is_openai(values, context) or any(name in values for name in DEFAULT_COLUMNS)):
        raise ValueError(
            "its first line is a JSON object: let the name end in .jsonl, or say --format jsonl, "
            "or --format text if its lines are prompts as they stand"
        )


def _json_record(index: int, line: bytes) -> Record:
    raw = line.decode("latin-1")
    try:
        values, repeated = parse_object(_decode(line))
    except ValueError as error:
        return Record(index, raw, problem=str(error))
    return Record(
        index, raw, values=values, problem=f"the key {shortened(repeated[0])} is there twice" if repeated else None
    )


def _text_record(index: int, line: bytes) -> Record:
    raw = line.decode("latin-1")
    try:
        return Record(index, raw, text=_decode(line))
    except ValueError as error:
        return Record(index, raw, problem=str(error))


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}") from None


def _of_text_table(data: bytes, name: str, context: BatchContext, cut: str | None) -> Records:
    names, rows = text_table(data, name, cut)
    if names:
        _check_columns(names, context)
    read_as_json = MEANT if context.prompt_column in PROMPT_KEYS else MEANT - {context.prompt_column}
    return Records(list(text_records(names, rows, read_as_json, cut)), "row", is_table=True)


def _of_parquet(data: bytes, context: BatchContext) -> Records:
    names, rows = parquet_table(data)
    _check_columns(names, context)
    return Records(list(parquet_records(rows)), "row", is_table=True)


def _check_columns(names: list[str], context: BatchContext) -> None:
    """ValueError, before any row, for a table without prompts, or with a parameter's name misspelt."""
    hint = ""
    if len(names) == 1 and (found := [mark for mark in ";\t|," if mark in names[0]]):
        hint = f"; they seem to be separated by {found[0]!r}, and are to be by commas, or in a .tsv by tabs"
    if not is_openai(dict.fromkeys(names), context):
        check_columns(names, context.prompt_column, FLAG, hint)
    check_spelling(names, OTHER_KEYS)


def _check_key(records: Iterable[Record], context: BatchContext) -> None:
    """ValueError where no object of a file has the key that was asked for."""
    column = context.prompt_column
    objects = [r.values for r in records if r.values is not None and not is_openai(r.values, context)]
    if column is not None and objects and not any(column in values for values in objects):
        raise ValueError(f"there is no key {shortened(column)}; the first object has {named(list(objects[0]))}")
