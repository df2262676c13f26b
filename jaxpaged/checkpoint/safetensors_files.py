"""All tensors of a set of safetensors files by name: headers are read at once, data only when asked for.

The safetensors library reads headers. It refuses one whose tensors do not fill the data from the first byte to the
last, without gaps and overlaps. Tensors are read, not mapped: the pages of a mapped file count as main memory of the
process until it is closed.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxpaged.checkpoint.tensor_check import Shape

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
LENGTH_BYTES = 8  # of the header's length, with which a file begins
#: One alone takes less from a fast disk, or from a file in main memory, than there is to get: 2.1 GB/s where four take
#: 2.7, on two cores.
READING_THREADS = 4


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor is. `dtype` is in safetensors' words ("BF16"), and need not be one that can be read."""

    file: Path
    name: str
    dtype: str
    shape: Shape
    start: int  # its first byte in the file
    version: tuple[int, int, int]  # of the file

    @property
    def num_bytes(self) -> int:
        """Where the dtype can be read."""
        return math.prod(self.shape) * ITEM_BYTES.get(self.dtype, 0)


def read_headers(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Every tensor of the files by name, in the order of the data; ValueError for a file that is not whole."""
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in _read_header(file):
            if tensor.name in tensors:
                raise ValueError(f"tensor {tensor.name} is both in {tensors[tensor.name].file} and in {file.name}")
            tensors[tensor.name] = tensor
    return tensors


def read_tensor(tensor: StoredTensor, rows: slice | None = None) -> np.ndarray:
    """A copy in host memory of a tensor, or of some of its rows.

    By the places that the library found in order: its own way to a tensor takes three times as long.
    """
    first, last, _ = (rows or slice(None)).indices(tensor.shape[0] if tensor.shape else 1)
    array = np.empty((last - first, *tensor.shape[1:]) if tensor.shape else (), DTYPES[tensor.dtype])
    row_bytes = tensor.num_bytes // max(1, tensor.shape[0] if tensor.shape else 1)
    with tensor.file.open("rb", buffering=0) as stream:
        if _version(stream.fileno()) != tensor.version:
            raise ValueError(f"{tensor.file} changed while it was read")
        stream.seek(tensor.start + first * row_bytes)
        left = memoryview(array.reshape(-1).view(np.uint8))
        while left and (count := stream.readinto(left)):
            left = left[count:]
    if left:
        raise _broken(tensor.file, f"{tensor.name} ends before its last byte")
    return array


def _version(file: int) -> tuple[int, int, int]:
    """What another file of this name, or another content of it, would have otherwise."""
    status = os.fstat(file)
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_ahead(tensors: Sequence[StoredTensor]) -> Generator[np.ndarray, None, None]:
    """`read_tensor` of each, in this order, while the caller works on those before: so many ahead of him, in several
    threads, as have no more bytes than the largest tensor."""
    sizes = [tensor.num_bytes for tensor in tensors]
    waiting, coming, ahead = deque[tuple[int, Future[np.ndarray]]](), 0, 0
    with ThreadPoolExecutor(READING_THREADS, thread_name_prefix="read") as threads:
        try:
            while waiting or coming < len(tensors):
                while coming < len(tensors) and ahead + sizes[coming] <= max(sizes):
                    waiting.append((sizes[coming], threads.submit(read_tensor, tensors[coming])))
                    ahead, coming = ahead + sizes[coming], coming + 1
                size, future = waiting.popleft()
                ahead -= size
                yield future.result()
                del future  # and with it the array, once the caller has no more use for it
        finally:
            threads.shutdown(cancel_futures=True)


def _read_header(file: Path) -> list[StoredTensor]:
    with file.open("rb") as stream, _opened(file) as stored:
        version = _version(stream.fileno())
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        header = stream.read(length)
        # The library takes the last of several tensors of one name; which one was meant cannot be told.
        if repeated := _repeated_names(header, file):
            raise _broken(file, f"its header has {', '.join(repeated)} twice")
        places, start = json.loads(header), LENGTH_BYTES + length
        parts = {name: stored.get_slice(name) for name in stored.offset_keys()}
        return [
            StoredTensor(
                file, name, part.get_dtype(), tuple(part.get_shape()), start + places[name]["data_offsets"][0], version
            )
            for name, part in parts.items()
        ]


def _repeated_names(header: bytes, file: Path) -> list[str]:
    repeated: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return dict(pairs)

    try:
        json.loads(header, object_pairs_hook=note)
    except (ValueError, RecursionError) as error:  # where Python's limits are narrower than the library's
        raise _broken(file, f"its header is malformed, {error}") from None
    return repeated


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="numpy", backend="pread") as stored:
            yield stored
    except SafetensorError as error:
        raise _broken(file, str(error)) from None


def _broken(file: Path, reason: str) -> ValueError:
    return ValueError(
        f"{file} is not a whole safetensors file: {reason}. Truncated, corrupt or a Git LFS pointer: fetch it again"
    )
