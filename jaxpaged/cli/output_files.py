"""Whether the files that a command is to write can be written, found out before it runs, which may take hours.

Nothing is left behind and nothing is changed: a file that is there is opened and closed, and where there is none, one
without a name is made beside it. (With the name, it could be removed from under another run.)
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from jaxpaged.batch.model_files import is_of_model
from jaxpaged.demo_model import find_model

Named = Mapping[str, str | Path | None]  # by flag; None: not given


def check_outputs(outputs: Named, inputs: Named | None = None, models: Named | None = None) -> None:
    """ValueError, which names the flag, where one of `outputs` could not be written, or would destroy something.

    That is another output, one of the `inputs`, or a file of one of the `models` (directories, or tokenizer files).
    """
    seen: dict[Path, str] = {}
    for flag, given in outputs.items():
        if given is None:
            continue
        path = Path(given)
        _check_writable(path, flag)
        for other, source in (inputs or {}).items():
            if source is not None and _are_same(path, Path(source)):
                raise ValueError(f"{flag} {path} is also the {other}: choose another file")
        for other, model in (models or {}).items():
            if model is not None:
                _check_beside_model(path, flag, Path(find_model(model)), other)
        real = path.resolve()
        if real in seen and _is_file_or_new(path):
            raise ValueError(f"{seen[real]} and {flag} both name {path}: give two files")
        seen[real] = flag


def _check_writable(path: Path, flag: str) -> None:
    what = f"{flag} {path} cannot be written"
    if os.path.isdir(path):
        raise ValueError(f"{flag} {path} is a directory: name a file in it")
    real = Path(os.path.realpath(path))  # what a link leads to is written
    if not os.path.isdir(real.parent):
        parent = real.parent if os.path.islink(path) else path.parent
        raise ValueError(f"{what}: {parent} is not a directory: create it, or choose another file")
    try:
        _try_to_open(real)
    except OSError as error:
        raise ValueError(f"{what}: {error.strerror}: choose another file") from None


def check_new_folder(path: Path, flag: str) -> None:
    """ValueError where a directory that may not be there yet cannot be made, or nothing be written to it."""
    existing = path
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"{flag} {path}: {existing} is not a directory: choose another place")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{flag} {path}: nothing can be written to {existing}: choose another place")


def _try_to_open(path: Path) -> None:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        with tempfile.TemporaryFile(dir=path.parent):
            return
    if stat.S_ISREG(mode):
        os.close(os.open(path, os.O_WRONLY))
    elif not os.access(path, os.W_OK):  # a pipe would wait for its reader
        raise PermissionError(0, "Permission denied")


def _is_file_or_new(path: Path) -> bool:
    return path.is_file() or not path.exists()


def _are_same(path: Path, other: Path) -> bool:
    if path.exists() and other.exists():
        return path.samefile(other)
    return path.resolve() == other.resolve()


def _check_beside_model(path: Path, flag: str, model: Path, other: str) -> None:
    real, root = path.resolve(), model.resolve()
    if real == root or (root.is_dir() and is_of_model(real, root)):
        raise ValueError(f"{flag} {path} is, or would be taken for, a file of {other} {model}: choose another file")
