"""Rows of JSON -> a Parquet file, and back. A column a key; pyarrow is imported where it is needed.

Our own keys have the types below. What a line has carried has the type that all its values have together; where they
have none, or hold objects, the column is text of JSON, and says so in its metadata. So nothing is lost: a file that is
read again gives the rows of which it would be made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jaxpaged.api.carried import ROW_KEYS

MARK = b"jaxpaged"  # in the metadata of a file that is ours, and of a column that is text of JSON
#: Rows that are turned into columns together: so many, and no more than so many bytes of JSON.
CHUNK_ROWS, CHUNK_BYTES = 4096, 1 << 25
#: Of keys that have a shape of their own for each row.
AS_JSON = ("settings", "response")

Rows = list[dict[str, Any]]


def pack_parquet(rows: Callable[[], Iterator[bytes]], file: BinaryIO) -> None:
    """`rows` is called twice: for the types, and to write."""
    import pyarrow
    import pyarrow.parquet

    schema = _schema(_chunks(rows()))
    with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for chunk in _chunks(rows()):
            columns = [_column(chunk, field) for field in schema]
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))


def unpack_parquet(path: Path) -> Iterator[bytes]:
    """The rows, each as a line. ValueError for a file that was not made here."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if MARK not in (schema.metadata or {}):
                raise ValueError(f"{path} is not a file that jaxpaged wrote")
            as_json = [field.name for field in schema if _is_json(field)]
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield _line(row, as_json)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no whole Parquet file ({' '.join(str(error).split())[:200]})") from None


def _line(row: dict[str, Any], as_json: list[str]) -> bytes:
    for name in as_json:
        if row[name] is not None:
            row[name] = json.loads(row[name])
    nulls = ("prompt",) if row.get("custom_id") is None else ("response", "error")
    kept = {k: v for k, v in row.items() if v is not None or k not in ROW_KEYS or k in nulls}
    return json.dumps({"id": kept.pop("id"), **kept}, ensure_ascii=False).encode() + b"\n"


def _chunks(rows: Iterable[bytes]) -> Iterator[Rows]:
    chunk, num_bytes = [], 0
    for row in rows:
        chunk.append(_clean(json.loads(row)))
        num_bytes += len(row)
        if len(chunk) == CHUNK_ROWS or num_bytes > CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def _clean(value: Any) -> Any:
    """Half of a surrogate pair, which JSON can spell and Parquet not, is written as U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if not value.isascii() else value
    if isinstance(value, list):
        return [_clean(inner) for inner in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(inner) for key, inner in value.items()}
    return value


def _schema(chunks: Iterator[Rows]) -> Any:
    """Columns of all keys that some row has: our own first, then what was carried, as it comes."""
    import pyarrow

    own, found = _own_types(), {"index": None}
    ids, nothing = pyarrow.null(), pyarrow.null()
    for chunk in chunks:
        ids = _join(ids, _kind([row["id"] for row in chunk]))
        for name in dict.fromkeys(key for row in chunk for key in row):
            is_own = name in ROW_KEYS
            found[name] = None if is_own else _join(found.get(name, nothing), _kind([row.get(name) for row in chunk]))
    fields = [pyarrow.field("id", pyarrow.string() if ids in (None, nothing) else ids)]
    fields += [_field(name, None if name in AS_JSON else kind) for name, kind in own.items() if name in found]
    fields += [_field(name, kind) for name, kind in found.items() if name not in ROW_KEYS]
    return pyarrow.schema(fields, metadata={MARK: b"rows"})


def _field(name: str, kind: Any) -> Any:
    import pyarrow

    if kind is None:
        return pyarrow.field(name, pyarrow.string(), metadata={MARK: b"json"})
    return pyarrow.field(name, kind)


def _own_types() -> dict[str, Any]:
    """Of our keys but the id, in the order of the columns."""
    import pyarrow as pa

    text, whole, real = pa.string(), pa.int64(), pa.float64()
    candidate = pa.struct({"token_id": whole, "token": text, "logprob": real, "rank": whole})
    logprobs = pa.list_(pa.list_(candidate))
    sample = pa.struct(
        {
            "index": whole, "text": text, "token_ids": pa.list_(whole), "finish_reason": text, "stop_reason": text,
            "score": real, "cumulative_logprob": real, "logprobs": logprobs,
        }
    )  # fmt: skip
    return {
        "index": whole, "custom_id": text, "line": whole, "prompt": text, "prompt_token_ids": pa.list_(whole),
        "num_prompt_tokens": whole, "outputs": pa.list_(sample), "prompt_logprobs": logprobs, "response": text,
        "error": pa.struct({"code": text, "message": text}), "seed": pa.uint64(), "fingerprint": text, "settings": text,
    }  # fmt: skip


def _kind(values: list[Any]) -> Any:
    """The type that they have together; None where they have none, or are objects."""
    import pyarrow

    if any(_has_object(value) for value in values):
        return None
    try:
        return pyarrow.array(values).type
    except (pyarrow.ArrowException, OverflowError):
        return None


def _has_object(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(map(_has_object, value)))


def _join(one: Any, other: Any) -> Any:
    """The type of a column that has values of both."""
    import pyarrow

    if one is None or other is None:
        return None
    if one == other:
        return one
    if pyarrow.types.is_null(one) or pyarrow.types.is_null(other):
        return one if pyarrow.types.is_null(other) else other
    if pyarrow.types.is_list(one) and pyarrow.types.is_list(other):
        inner = _join(one.value_type, other.value_type)
        return None if inner is None else pyarrow.list_(inner)
    numbers = (pyarrow.int64(), pyarrow.float64())
    return pyarrow.float64() if one in numbers and other in numbers else None


def _is_json(field: Any) -> bool:
    return MARK in (field.metadata or {})


def _column(rows: Rows, field: Any) -> Any:
    import pyarrow

    values = [row.get(field.name) for row in rows]
    if _is_json(field):
        values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    elif field.name == "id" and field.type == pyarrow.string():
        values = [None if value is None else str(value) for value in values]
    elif field.type == pyarrow.float64():
        values = [None if value is None else float(value) for value in values]
    elif field.name == "outputs":
        values = [samples and [_with_text_reason(sample) for sample in samples] for samples in values]
    return pyarrow.array(values, field.type)


def _with_text_reason(sample: dict[str, Any]) -> dict[str, Any]:
    """A stop reason is a text or a token id; a column has one type."""
    reason = sample.get("stop_reason")
    return {**sample, "stop_reason": None if reason is None else str(reason)}
