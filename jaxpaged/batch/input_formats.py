"""How a file is read, by the end of its name; and what is refused, since its lines or rows would be no prompts."""

from __future__ import annotations

import codecs
import importlib.util
from pathlib import Path
from typing import NamedTuple

FORMATS = ("auto", "text", "jsonl", "json", "csv", "tsv", "parquet")
TABLES = ("csv", "tsv", "parquet")
#: The end of a name -> how the file is read. All but Parquet may have .gz behind it.
READ = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".txt": "text",
}  # fmt: skip
_TABLE = "save it as .csv or .parquet"
_SHEET = "save it as .csv"
_PACKED = "unpack it first, or pack it with gzip"
_DOCUMENT = "write its prompts as text, one a line, or as JSON lines"
#: What to do with some of the others.
REMEDIES = {
    ".arrow": _TABLE, ".feather": _TABLE, ".orc": _TABLE, ".avro": _TABLE, ".npy": _TABLE, ".npz": _TABLE,
    ".pkl": _TABLE, ".pickle": _TABLE, ".h5": _TABLE, ".hdf5": _TABLE, ".db": _TABLE, ".sqlite": _TABLE,
    ".sqlite3": _TABLE, ".dta": _TABLE, ".sav": _TABLE,
    ".tab": "say --format tsv", ".psv": "separate its columns with commas",
    ".xlsx": _SHEET, ".xls": _SHEET, ".xlsm": _SHEET, ".xlsb": _SHEET, ".ods": _SHEET,
    ".docx": _DOCUMENT, ".doc": _DOCUMENT, ".odt": _DOCUMENT, ".pdf": _DOCUMENT, ".rtf": _DOCUMENT,
    ".html": _DOCUMENT, ".htm": _DOCUMENT, ".xml": _DOCUMENT, ".ipynb": _DOCUMENT,
    ".yaml": "write one JSON object a line", ".yml": "write one JSON object a line",
    ".bz2": _PACKED, ".xz": _PACKED, ".zst": _PACKED, ".zip": _PACKED, ".tar": _PACKED, ".7z": _PACKED,
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


class InputFormat(NamedTuple):
    """How to read a file."""

    name: str  # one of FORMATS; "auto": its first line decides between text and JSON lines
    is_gzip: bool = False
    is_said: bool = False  # by --format, so that what the file looks like does not count


def format_of_name(path: str, file_format: str) -> InputFormat:
    """The format that was asked for, or what the name's ending says; "auto" for a name without one, and for "-".

    ValueError for an ending that says nothing, with those that do.
    """
    ending = Path(path).suffix.lower()
    is_gzip = ending == ".gz"
    if is_gzip:
        ending = Path(path).with_suffix("").suffix.lower()
    if file_format != "auto":
        return InputFormat(file_format, is_gzip, is_said=True)
    if ending and ending not in READ:
        remedy = f": {REMEDIES[ending]}" if ending in REMEDIES else ""
        raise ValueError(
            f"{ending} files are not read{remedy}; what is read: {', '.join(READ)}, all but .parquet also with .gz "
            f"behind it; another file with --format, which is one of {', '.join(FORMATS[1:])}"
        )
    found = InputFormat(READ.get(ending, "auto"), is_gzip)
    if is_gzip and found.name == "parquet":
        raise ValueError(".parquet.gz files are not read, since Parquet compresses itself: unpack it with gunzip")
    return found


def check_beginning(data: bytes) -> None:
    """ValueError for bytes that begin like an archive or a table, or have NUL bytes, which no text has."""
    for beginning, name in BEGINNINGS.items():
        if data.startswith(beginning):
            raise ValueError(
                f"the input is {name}, not lines of text or JSON: unpack or convert it to JSON lines; a file whose "
                f"name ends in {', '.join(READ)} or .gz is read as that"
            )
    start = data[:BEGINNING_BYTES].removeprefix(codecs.BOM_UTF8).lstrip()
    if b"\0" in start and not start.startswith(b"{"):
        raise ValueError(
            "the input has NUL bytes, as binary files and UTF-16 do: convert it to JSON lines or a prompt a line, "
            "in UTF-8; --format text takes its lines as prompts all the same"
        )


def need_pyarrow(what: str) -> None:
    """ValueError, which names the extra, where what Parquet needs is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{what} needs pyarrow, which is not installed: pip install 'jaxpaged[parquet]'")
