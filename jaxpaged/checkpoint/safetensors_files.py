"""All tensors of a set of safetensors files by name: headers are read at once, data only when asked for.

The files are read, not mapped: the pages of a mapped file count as host memory of the process until it is closed. The
format is a u64 header length, a JSON header {name: {dtype, shape, data_offsets}} and the data, all little-endian
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpaged.checkpoint.tensor_check import Shape

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation; more means that the file is something else


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor is. `dtype` is in safetensors' words ("BF16"), and need not be one that can be read."""

    file: Path
    offset: int
    dtype: str
    shape: Shape


def read_headers(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Every tensor of the files by name; ValueError for a file that is not whole."""
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _read_header(file).items():
            if name in tensors:
                raise ValueError(f"tensor {name} is both in {tensors[name].file} and in {file.name}")
            tensors[name] = tensor
    return tensors


def read_tensor(tensor: StoredTensor, rows: slice | None = None) -> np.ndarray:
    """A copy in host memory of a tensor, or of some of its rows."""
    dtype = jnp.dtype(DTYPES[tensor.dtype])
    start, stop, _ = (rows or slice(None)).indices(tensor.shape[0])
    shape = (stop - start, *tensor.shape[1:])
    row_bytes = math.prod(tensor.shape[1:]) * dtype.itemsize
    num_bytes = math.prod(shape) * dtype.itemsize
    data = np.fromfile(tensor.file, np.uint8, num_bytes, offset=tensor.offset + start * row_bytes)
    if data.size != num_bytes:
        raise ValueError(f"{tensor.file} became shorter while it was read")
    return data.view(dtype).reshape(shape)


def _read_header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if not 2 <= header_bytes <= min(size - 8, MAX_HEADER_BYTES):
            raise _broken(file, f"{size} bytes cannot begin with a header of {header_bytes}")
        header = stream.read(header_bytes)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        return {name: _parse_entry(file, entry, 8 + header_bytes, size) for name, entry in entries.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise _broken(file, f"its header is malformed, {type(error).__name__}: {error}") from None


def _parse_entry(file: Path, entry: dict[str, Any], data_start: int, size: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    tensor = StoredTensor(file, data_start + begin, entry["dtype"], tuple(entry["shape"]))
    if not 0 <= begin <= end or data_start + end > size:
        raise _broken(file, f"it has {size} bytes, its header promises at least {data_start + end}")
    if tensor.dtype in DTYPES and math.prod(tensor.shape) * jnp.dtype(DTYPES[tensor.dtype]).itemsize != end - begin:
        raise _broken(file, f"its header gives {end - begin} bytes to {tensor.dtype} {list(tensor.shape)}")
    return tensor


def _broken(file: Path, reason: str) -> ValueError:
    return ValueError(
        f"{file} is not a whole safetensors file: {reason}. Truncated, corrupt or a Git LFS pointer: fetch it again"
    )
