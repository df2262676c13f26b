"""Outputs to which no row can be appended: `.parquet` and `.jsonl.gz`.

While the run lasts its rows go to a journal beside the output, `out.parquet.jsonl`, which is an output of JSON lines
with all that is promised of one (results.py). When the run is over, the file is made of it, in the order of the input,
beside its place and then put there in one step; then the journal goes. So at any moment one of the two holds every row:
the journal, where there is one, else the file. A run that begins with a finished file makes the journal of it again.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from jaxpaged.batch.input_formats import REMEDIES, need_pyarrow
from jaxpaged.batch.parquet_rows import pack_parquet, unpack_parquet
from jaxpaged.batch.requests import BatchRequest, InvalidLine
from jaxpaged.batch.results import ResultStream, open_locked, open_result_file, write_errors
from jaxpaged.batch.resume import REMEDY, EarlierRun

#: Ends of names that promise what no output is.
NOT_WRITTEN = frozenset((*REMEDIES, ".csv", ".tsv", ".gz"))


class Packing(NamedTuple):
    """How a file is made of rows of JSON, and rows of a file; ValueError where it is not one that was made so."""

    pack: Callable[[Callable[[], Iterator[bytes]], BinaryIO], None]  # of what gives the rows anew at each call
    unpack: Callable[[Path], Iterator[bytes]]


def _pack_gzip(rows: Callable[[], Iterator[bytes]], file: BinaryIO) -> None:
    with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        for row in rows():
            packed.write(row)


def _unpack_gzip(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) as file:
            yield from file
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is no whole gzip file ({error})") from None


PACKINGS = {".parquet": Packing(pack_parquet, unpack_parquet), ".jsonl.gz": Packing(_pack_gzip, _unpack_gzip)}


def packing_of(path: Path) -> Packing | None:
    """None for a file of JSON lines; ValueError for a name that promises another."""
    name = path.name.lower()
    for ending, packing in PACKINGS.items():
        if name.endswith(ending):
            if ending == ".parquet":
                need_pyarrow("a .parquet output")
            return packing
    if path.suffix.lower() in NOT_WRITTEN:
        raise ValueError(
            f"{path}: {path.suffix} files are not written: rows are JSON lines, .jsonl or of another name, or "
            f"{' or '.join(PACKINGS)}"
        )
    return None


def journal_of(path: Path) -> Path:
    """Where the rows of a packed output stand while its run is not over."""
    real = path.resolve()
    return real.with_name(f"{real.name}.jsonl")


class PackedStream(ResultStream):
    """Writes rows to the journal, and at the `finish` of a run the file."""

    def __init__(self, stream: ResultStream, path: Path, packing: Packing, is_changed: bool):
        self._stream = stream
        self._path = path
        self._packing = packing
        self._journal = journal_of(path)
        self._is_changed = is_changed  # whether the file lacks a row of the journal

    def write(self, row: dict[str, Any], settings: Mapping[str, Any] | None = None) -> None:
        self._is_changed = True
        self._stream.write(row, settings)

    def finish(self) -> None:
        with write_errors():
            if self._is_changed or not self._path.exists():
                self._pack()
            self._journal.unlink()

    def close(self) -> None:
        if self._journal.exists() and self._journal.stat().st_size == 0:
            self._journal.unlink()
        self._stream.close()

    def _pack(self) -> None:
        places = _places(self._journal)

        def rows() -> Iterator[bytes]:
            with self._journal.open("rb") as file:
                for place in places:
                    file.seek(place)
                    yield file.readline()

        with _replacing(self._path) as file:
            self._packing.pack(rows, file)


def open_packed_file(
    path: Path, packing: Packing, lines: Sequence[BatchRequest | InvalidLine], overwrite: bool = False
) -> tuple[ResultStream, EarlierRun]:
    """As `open_result_file`, for an output that is packed when its run is over."""
    path = path.resolve()  # a link stays a link
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file: of pipes and devices only JSON lines can be written")
    journal = journal_of(path)
    is_of_file = False  # the journal, and so it may go again
    if overwrite:
        os.close(open_locked(journal))  # of which no other run may have it
        path.unlink(missing_ok=True)
    elif path.exists():
        is_of_file = _unpack(path, packing, journal)
    try:
        stream, earlier = open_result_file(journal, lines, overwrite)
    except ValueError:
        if is_of_file:
            journal.unlink(missing_ok=True)
        raise
    return PackedStream(stream, path, packing, not is_of_file or bool(earlier.stale)), earlier


def _unpack(path: Path, packing: Packing, journal: Path) -> bool:
    """Make the journal of the file, unless there is one; whether it was made. ValueError for another's file."""
    try:
        rows = packing.unpack(path)
        first = list(itertools.islice(rows, 1))  # whose file it is shows here
        descriptor = open_locked(journal)
        try:
            if os.fstat(descriptor).st_size:
                return False
            with _replacing(journal) as file:
                file.writelines(itertools.chain(first, rows))
            return True
        except BaseException:
            journal.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
    except ValueError as error:
        raise ValueError(f"{error}: {REMEDY}") from None


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of another when it is whole, with its mode; what a killed run left of one goes."""
    beside = path.with_name(f".{path.name}.partial")
    beside.unlink(missing_ok=True)
    try:
        with beside.open("xb") as file:
            if path.exists():
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _places(journal: Path) -> list[int]:
    """Where the rows begin, in the order of the input."""
    places, place = [], 0
    with journal.open("rb") as file:
        for row in file:
            places.append((json.loads(row)["index"], place))
            place += len(row)
    return [place for _, place in sorted(places)]
