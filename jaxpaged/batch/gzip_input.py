"""The bytes of an input file, unpacked where it is gzip's; of one that ends early, what can be unpacked."""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

CHUNK_BYTES = 1 << 16


class InputData(NamedTuple):
    """What an input holds, and why that is not all of it; None where it is."""

    data: bytes
    cut: str | None = None


def read_data(path: str, is_gzip: bool) -> InputData:
    """OSError where the file cannot be read, ValueError where nothing of it can be unpacked; "-" is standard input."""
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    return unpack(data) if is_gzip else InputData(data)


def unpack(data: bytes) -> InputData:
    """What comes before the damage is kept. A checksum comes last: where it alone is wrong, all of it is there."""
    if data and not data.startswith(b"\x1f\x8b"):
        raise ValueError("the file is not gzip's: leave .gz out of its name, or pack it")
    chunks: list[bytes] = []
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            while chunk := file.read1(CHUNK_BYTES):
                chunks.append(chunk)
    except EOFError:
        return InputData(b"".join(chunks), "the gzip data ends early")
    except (OSError, zlib.error) as error:
        return InputData(b"".join(chunks), f"the gzip data is damaged ({error})")
    return InputData(b"".join(chunks))
