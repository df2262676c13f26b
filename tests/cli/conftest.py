"""What tests of the command share."""

from __future__ import annotations

import pytest


@pytest.fixture
def model(tmp_path) -> str:
    """A directory that is taken for a model until someone reads it."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return str(directory)
