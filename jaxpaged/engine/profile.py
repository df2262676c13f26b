"""A trace of what host and device do, by jax's profiler, in the form that Perfetto reads (https://ui.perfetto.dev)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax.profiler


@contextmanager
def trace_to(path: Path) -> Iterator[None]:
    """Take down the block, and write it to `path` when it ends, as compressed JSON. ValueError, before the block, where
    the path's directory is not there."""
    if not path.parent.is_dir():
        raise ValueError(f"the profile {path} cannot be written: {path.parent} is not a directory")
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            yield
        (trace,) = Path(folder).glob("plugins/profile/*/perfetto_trace.json.gz")
        shutil.copyfile(trace, path)
