"""Finds the files of a checkpoint directory and says, in words, which one is missing or cannot be read.

Names come from strangers: whatever is opened is a regular file that stands in the directory.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ValueError with the place of the mistake when it is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a byte order mark
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:  # of JSON, of UTF-8, or an integer of too many digits
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return values


def user_path(path: str | os.PathLike[str]) -> Path:
    """What someone gave as a path, with ~ expanded; ValueError for what no file system takes, such as an empty one."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise ValueError(f"a path must be a string or a pathlib.Path, got {path!r}")
    if not os.fspath(path) or not _is_encodable(os.fspath(path)):
        raise ValueError(f"{os.fspath(path)!r} is no path: give the directory of a checkpoint")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # ~name of nobody
        raise ValueError(f"{path}: {error}") from None


def find_file(directory: Path, name: str) -> Path | None:
    """The file `name` of the directory, None where there is none; ValueError for anything but a regular file.

    Opening a pipe waits for a writer, perhaps for ever. A link may lead anywhere (downloads are links to a cache of
    files), but one that leads nowhere is an error: it is a file that has been lost.
    """
    path = directory / name
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            raise  # of permission, or of the disk
        if os.path.islink(path):
            raise FileNotFoundError(f"{path} is a link to {os.readlink(path)}, which does not exist") from None
        return None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is {_kind(mode)}: a checkpoint has regular files only")
    return path


def find_weight_files(directory: Path) -> list[Path]:
    """The safetensors files to read: those of the index, else `model.safetensors`, else every one there is."""
    single = find_file(directory, SINGLE_NAME)
    if find_file(directory, INDEX_NAME) is not None:
        files = _indexed_files(directory)
        if single is not None and single not in files:  # transformers reads this one, other programs the index
            raise ValueError(
                f"{directory} has {SINGLE_NAME}, and {INDEX_NAME} names other files: remove the one that is out of date"
            )
        return files
    if single is not None:
        return [single]
    names = sorted(file.name for file in directory.glob("*.safetensors"))
    files = [file for name in names if (file := find_file(directory, name)) is not None]
    if not files:
        raise _no_weights(directory)
    return files


def read_weight_map(directory: Path) -> dict[str, str]:
    """The index's names of tensors -> names of files, each in this directory; empty where there is no index."""
    index = find_file(directory, INDEX_NAME)
    if index is None:
        return {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f'{index} has no "weight_map" of tensor names to file names')
    for tensor, name in weight_map.items():
        if not _is_plain(name):
            raise ValueError(
                f"{index} has {tensor} in {name!r}: only names of files in the same directory are read, without a path"
            )
    return weight_map


def _indexed_files(directory: Path) -> list[Path]:
    names = sorted(set(read_weight_map(directory).values()))
    if not names:
        raise ValueError(f'the "weight_map" of {directory / INDEX_NAME} is empty')
    files = {name: find_file(directory, name) for name in names}
    if missing := [name for name, file in files.items() if file is None]:
        raise FileNotFoundError(f"{INDEX_NAME} names {', '.join(missing)}, which is not in {directory}")
    return [file for file in files.values() if file is not None]


def _is_plain(name: str) -> bool:
    """Whether a name stands for a file beside the one that it is written in, on any system, and can be shown."""
    return name not in ("", ".", "..") and name.isprintable() and not set(name) & set("/\\:")


def _is_encodable(path: str) -> bool:
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFDIR: "a directory", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _no_weights(directory: Path) -> Exception:
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern))
    if not pickled:
        return FileNotFoundError(f"no *.safetensors file in {directory}; load_format='dummy' makes random weights")
    return ValueError(
        f"{directory} has its weights as {pickled[0]}, a pickle, which jaxpaged does not read; convert it once with "
        f"transformers: AutoModelForCausalLM.from_pretrained(source, dtype='auto').save_pretrained(destination)"
    )
