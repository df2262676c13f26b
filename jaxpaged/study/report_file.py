"""All figures of a script as a file of JSON: tens of kilobytes are no line for a terminal."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_report(report: dict[str, Any], path: Path | None, name: str) -> Path:
    """Write the report there, or else to a new file among the temporary ones, named after the script; say where."""
    if path is None:
        descriptor, made = tempfile.mkstemp(prefix=f"{name}-", suffix=".json")
        os.close(descriptor)
        path = Path(made)
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return path


def report_path(text: str) -> Path:
    """A flag's value, refused before any work where the file could not be written."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a directory: name a file in it")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent} is not a directory")
    return path
