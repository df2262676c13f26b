"""The output: whole rows, each in one write, in a file that one run at a time may hold.

A row reaches the operating system before the next is made, so a killed process loses nothing that it reported; a row
that the kill cut in two is dropped by the next run. `fsync`, which only a power cut needs, runs every few seconds.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxpaged.batch.requests import BatchRequest, InvalidLine
from jaxpaged.batch.resume import EarlierRun, read_earlier_run
from jaxpaged.batch.rows import ROW_START

SYNC_SECONDS = 5.0
COPY_BYTES = 1 << 20


class WriteError(Exception):
    """A row could not be written: the disk is full, or gone."""


class ResultStream:
    """Writes rows to a descriptor: standard output, a pipe, or the file that `open_result_file` opened."""

    def __init__(self, descriptor: int, is_file: bool = False):
        self._descriptor = descriptor
        self._is_file = is_file
        self._synced_at = time.monotonic()

    def write(self, row: dict[str, Any], settings: Mapping[str, Any] | None = None) -> None:
        """`settings`: of the row's request; a file, with which a later run may go on, has them too."""
        if self._is_file and settings:
            row = {**row, "settings": settings}
        # backslashreplace turns half a surrogate pair (in an error that quotes its line) into a JSON escape.
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
        assert line.startswith(ROW_START)
        with write_errors():
            _write_all(self._descriptor, line)
            if self._is_file and time.monotonic() - self._synced_at > SYNC_SECONDS:
                os.fsync(self._descriptor)
                self._synced_at = time.monotonic()

    def close(self) -> None:
        if self._is_file:
            try:
                with write_errors():
                    os.fsync(self._descriptor)
            finally:
                os.close(self._descriptor)

    def finish(self) -> None:
        """The run is over, and has written all its rows: for outputs that are made of them then (packed_results.py)."""


@contextmanager
def write_errors() -> Iterator[None]:
    """What the system says of a write, as a `WriteError`."""
    try:
        yield
    except BrokenPipeError:  # not a fault: the reader has seen enough
        raise
    except OSError as error:
        raise WriteError(f"cannot write the output: {error.strerror or error}") from error


def open_result_file(
    path: Path, lines: Sequence[BatchRequest | InvalidLine], overwrite: bool = False
) -> tuple[ResultStream, EarlierRun]:
    """Open `path` for this run's rows and say what an earlier run left in it.

    Raises OSError where it cannot be written, ValueError where it belongs to another run, past or present.
    """
    if path.exists() and not path.is_file():  # a pipe or device, where there is nothing to resume
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a directory: name a file in it")
        return ResultStream(os.open(path, os.O_WRONLY)), EarlierRun()
    path = path.resolve()  # a link stays a link when stale rows are dropped
    descriptor = open_locked(path)
    try:
        if overwrite:
            os.ftruncate(descriptor, 0)
            return ResultStream(descriptor, is_file=True), EarlierRun()
        earlier = read_earlier_run(path, lines)
        if earlier.stale:
            descriptor = _rewrite_without(earlier, path, descriptor)
        elif os.fstat(descriptor).st_size > earlier.length:
            os.ftruncate(descriptor, earlier.length)
        return ResultStream(descriptor, is_file=True), earlier
    except BaseException:
        os.close(descriptor)
        raise


def open_locked(path: Path) -> int:
    """Two runs appending to one file would each think the other's lines missing."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(f"{path} is being written by another run: wait for it, or choose another output") from None
        if _is_still(path, descriptor):
            return descriptor
        os.close(descriptor)  # another run replaced the file between our open and our lock


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _rewrite_without(earlier: EarlierRun, path: Path, descriptor: int) -> int:
    """Drop the stale rows: copy the others beside the file, then take its place in one step, holding both locks.

    What lies there already, of a run that was killed or a link that somebody made, is removed and never written to.
    """
    beside = path.with_name(f".{path.name}.partial")
    beside.unlink(missing_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_APPEND
    copy = os.open(beside, flags, stat.S_IMODE(os.fstat(descriptor).st_mode))
    try:
        fcntl.flock(copy, fcntl.LOCK_EX | fcntl.LOCK_NB)
        kept_from = 0
        for start, end in [*earlier.stale, (earlier.length, earlier.length)]:
            _copy_range(descriptor, copy, kept_from, start)
            kept_from = end
        os.fsync(copy)
        os.replace(beside, path)
    except BaseException:
        os.close(copy)
        raise
    os.close(descriptor)
    return copy


def _copy_range(source: int, destination: int, start: int, end: int) -> None:
    while start < end:
        data = os.pread(source, min(end - start, COPY_BYTES), start)
        _write_all(destination, data)
        start += len(data)


def _write_all(descriptor: int, data: bytes) -> None:
    remaining = memoryview(data)
    while remaining:  # a full pipe or a signal may take only a part
        remaining = remaining[os.write(descriptor, remaining) :]
