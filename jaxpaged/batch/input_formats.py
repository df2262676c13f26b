"""Which files are read as lines: a table or an archive that is taken for text would become prompts, line by line."""

from __future__ import annotations

from pathlib import Path

JSON_LINES = (".jsonl", ".ndjson")
_TABLE = "write one JSON object a row, such as pandas' to_json(..., orient='records', lines=True)"
_PACKED = "unpack it first"
_SHEET = f"read it with a spreadsheet or pandas, and {_TABLE}"
#: What no line of which is a prompt, by its name's ending, and how to make lines of it.
REMEDIES = {
    ".csv": _TABLE, ".tsv": _TABLE, ".parquet": _TABLE, ".arrow": _TABLE, ".feather": _TABLE, ".orc": _TABLE,
    ".avro": _TABLE, ".xlsx": _SHEET, ".xls": _SHEET, ".ods": _SHEET, ".npy": _TABLE, ".npz": _TABLE, ".pkl": _TABLE,
    ".json": "write one object a line (jq -c '.[]'), or say --format jsonl if it has one already",
    ".yaml": "write one JSON object a line", ".yml": "write one JSON object a line",
    ".gz": _PACKED, ".bz2": _PACKED, ".xz": _PACKED, ".zst": _PACKED, ".zip": _PACKED, ".tar": _PACKED, ".7z": _PACKED,
}  # fmt: skip
#: How such files begin, for those whose name says nothing.
BEGINNINGS = {
    b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip, which spreadsheets are too", b"PAR1": "Parquet", b"ARROW1": "Arrow",
    b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x93NUMPY": "numpy",
}  # fmt: skip


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
    """ValueError for bytes that begin like an archive or a binary table."""
    for beginning, name in BEGINNINGS.items():
        if data.startswith(beginning):
            raise ValueError(f"the input is {name}, not lines of text or JSON: unpack or convert it to JSON lines")
