"""All tensors of a set of safetensors files by name: headers are read at once, data only when asked for.

The safetensors library reads them. It refuses a header whose tensors do not fill the data from the first byte to the
last, without gaps and overlaps. Whole tensors are read, not mapped: the pages of a mapped file count as main memory of
the process until it is closed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxpaged.checkpoint.tensor_check import Shape

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor is. `dtype` is in safetensors' words ("BF16"), and need not be one that can be read."""

    file: Path
    name: str
    dtype: str
    shape: Shape


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
    """A copy in host memory of a tensor, or of some of its rows."""
    # Of a mapped file only the rows are touched; the other way would read the whole tensor for every few of them.
    with _opened(tensor.file, backend="pread" if rows is None else "mmap") as stored:
        part = stored.get_slice(tensor.name)
        if (part.get_dtype(), tuple(part.get_shape())) != (tensor.dtype, tensor.shape):
            raise ValueError(f"{tensor.file} changed while it was read")
        if rows is None:
            return stored.get_tensor(tensor.name)
        return part[slice(*rows.indices(tensor.shape[0]))]


def _read_header(file: Path) -> list[StoredTensor]:
    with file.open("rb") as stream, _opened(file, backend="pread") as stored:
        # The library takes the last of several tensors of one name; which one was meant cannot be told.
        if repeated := _repeated_names(stream.read(int.from_bytes(stream.read(8), "little")), file):
            raise _broken(file, f"its header has {', '.join(repeated)} twice")
        parts = {name: stored.get_slice(name) for name in stored.offset_keys()}
        return [StoredTensor(file, name, part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()]


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
def _opened(file: Path, *, backend: str) -> Iterator[Any]:
    try:
        with safe_open(file, framework="numpy", backend=backend) as stored:
            yield stored
    except SafetensorError as error:
        raise _broken(file, str(error)) from None


def _broken(file: Path, reason: str) -> ValueError:
    return ValueError(
        f"{file} is not a whole safetensors file: {reason}. Truncated, corrupt or a Git LFS pointer: fetch it again"
    )
