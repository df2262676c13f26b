"""Which files are read as lines: a table or an archive that is taken for text would become prompts, line by line."""

from __future__ import annotations

import codecs
from pathlib import Path

JSON_LINES = (".jsonl", ".ndjson")
_TABLE = "write one JSON object a row, such as pandas' to_json(..., orient='records', lines=True)"
_PACKED = "unpack it first"
_SHEET = f"read it with a spreadsheet or pandas, and {_TABLE}"
_DOCUMENT = "write its prompts as text, one a line, or as JSON lines"
#: What no line of which is a prompt, by its name's ending, and how to make lines of it.
REMEDIES = {
    ".csv": _TABLE, ".tsv": _TABLE, ".parquet": _TABLE, ".arrow": _TABLE, ".feather": _TABLE, ".orc": _TABLE,
    ".avro": _TABLE, ".npy": _TABLE, ".npz": _TABLE, ".pkl": _TABLE, ".pickle": _TABLE, ".tab": _TABLE, ".psv": _TABLE,
    ".h5": _TABLE, ".hdf5": _TABLE, ".db": _TABLE, ".sqlite": _TABLE, ".sqlite3": _TABLE,
    ".dta": _TABLE, ".sav": _TABLE,
    ".xlsx": _SHEET, ".xls": _SHEET, ".xlsm": _SHEET, ".xlsb": _SHEET, ".ods": _SHEET,
    ".docx": _DOCUMENT, ".doc": _DOCUMENT, ".odt": _DOCUMENT, ".pdf": _DOCUMENT, ".rtf": _DOCUMENT,
    ".html": _DOCUMENT, ".htm": _DOCUMENT, ".xml": _DOCUMENT, ".ipynb": _DOCUMENT,
    ".json": "write one object a line (jq -c '.[]'), or say --format jsonl if it has one already",
    ".yaml": "write one JSON object a line", ".yml": "write one JSON object a line",
    ".gz": _PACKED, ".bz2": _PACKED, ".xz": _PACKED, ".zst": _PACKED, ".zip": _PACKED, ".tar": _PACKED, ".7z": _PACKED,
    ".tgz": _PACKED, ".tbz2": _PACKED, ".txz": _PACKED, ".zstd": _PACKED, ".lz4": _PACKED, ".rar": _PACKED,
}  # fmt: skip
#: How such files begin, for those whose name says nothing.
BEGINNINGS = {
    b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip, which spreadsheets are too", b"PAR1": "Parquet", b"ARROW1": "Arrow",
    b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x93NUMPY": "numpy",
    b"SQLite format 3\x00": "an SQLite database", b"\x89HDF\r\n": "HDF5", b"Obj\x01": "Avro", b"%PDF-": "PDF",
    b"7z\xbc\xaf": "7z", b"Rar!\x1a": "rar", b"\x04\x22\x4d\x18": "lz4",
}  # fmt: skip
#: A binary file that begins in none of these ways has a NUL byte in the first so many.
BEGINNING_BYTES = 8192


def format_of_name(path: str, file_format: str) -> str:
    """The format to read a file in: the one that was asked for, or what the name's ending says, or else "auto".

    ValueError for a name that promises something else than lines.
    """
    suffix = Path(path).suffix.lower()
    if file_format != "auto":
        return file_format
    if suffix in REMEDIES:
        raise ValueError(
            f"{suffix} files are not read, only text (a prompt a line) and JSON lines (.jsonl): {REMEDIES[suffix]}; "
            "--format text takes its lines as prompts all the same"
        )
    return "jsonl" if suffix in JSON_LINES else "auto"


def check_beginning(data: bytes) -> None:
    """ValueError for bytes that begin like an archive or a table, or have NUL bytes, which no text has."""
    for beginning, name in BEGINNINGS.items():
        if data.startswith(beginning):
            raise ValueError(f"the input is {name}, not lines of text or JSON: unpack or convert it to JSON lines")
    start = data[:BEGINNING_BYTES].removeprefix(codecs.BOM_UTF8).lstrip()
    if b"\0" in start and not start.startswith(b"{"):
        raise ValueError(
            "the input has NUL bytes, as binary files and UTF-16 do: convert it to JSON lines or a prompt a line, "
            "in UTF-8; --format text takes its lines as prompts all the same"
        )
