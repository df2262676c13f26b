"""A checksum a tensor of the native format: what is loaded is what was saved, or an error names the tensor.

Neither orbax nor its compression notices every flipped bit. checksums.json has one line a tensor: its dtype and the
CRC-32 of its bytes in row-major order, little-endian, as 8 hexadecimal digits.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from jaxpaged.checkpoint.files import find_file, read_json

FILE_NAME = "checksums.json"
ALGORITHM = "crc32"

Checksums = dict[str, str]  # by the tensor's name: "bfloat16 0c5e1a37"


def compute_checksums(tensors: Mapping[str, jax.Array | np.ndarray]) -> Checksums:
    """Of all tensors, on several cores: zlib leaves Python's lock alone while it reads."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(tensors, pool.map(_checksum, tensors.values()), strict=True))


def check_tensors(tensors: Mapping[str, np.ndarray], expected: Checksums, folder: Path) -> None:
    """ValueError with the names of tensors that are not those of `expected`, which holds these and others."""
    found = compute_checksums(tensors)
    if wrong := [
        f"{name} is {found[name]}, expected {expected[name]}" for name in found if found[name] != expected[name]
    ]:
        raise ValueError(
            f"{folder} is damaged: {FILE_NAME} has another checksum for {len(wrong)} of its tensors: {wrong[0]}; "
            "copy or convert the checkpoint again"
        )


def write_checksums(directory: Path, checksums: Checksums) -> None:
    values = {"algorithm": ALGORITHM, "tensors": checksums}
    (directory / FILE_NAME).write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")


def read_checksums(directory: Path, names: set[str]) -> Checksums:
    """The checksums of exactly these tensors; ValueError where the file does not have them."""
    file = find_file(directory, FILE_NAME)
    if file is None:
        raise FileNotFoundError(f"{directory} has no {FILE_NAME}, which this version of the native format comes with")
    values = read_json(file)
    if values.get("algorithm") != ALGORITHM:
        raise ValueError(f"{file}: algorithm is {values.get('algorithm')!r}; this jaxpaged knows {ALGORITHM}")
    checksums = values.get("tensors")
    if not isinstance(checksums, dict) or set(checksums) != names:
        raise ValueError(f'{file}: "tensors" must have a checksum for each of the {len(names)} tensors and no other')
    return checksums


def _checksum(tensor: jax.Array | np.ndarray) -> str:
    data = np.ascontiguousarray(tensor).reshape(-1)
    return f"{data.dtype.name} {zlib.crc32(data.view(np.uint8)):08x}"
