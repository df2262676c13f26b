"""The model that comes with the package: 5.5 million parameters that write Python. tiny-python/README.md says more.

Wherever a model is named, "demo" is this one, unless a checkpoint of that name lies in the working directory.
"""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

NAME = "demo"


def directory() -> Path:
    """Where its checkpoint is."""
    return Path(str(files(__name__) / "tiny-python"))


def find_model(name: str | Path) -> str | Path:
    """The directory of the bundled model where its name is given; anything else as it is."""
    return directory() if str(name) == NAME and not os.path.lexists(os.path.join(NAME, "config.json")) else name
