"""CHANGELOG.md says where everything went that had another path, and old paths are not kept."""

from __future__ import annotations

import importlib.util
import re

from paths import ROOT

ROWS = re.findall(r"^\| (`.*`) \| (`.*`) \|$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def is_there(path: str) -> bool:
    if path.startswith("scripts/"):
        return (ROOT / path).is_file()
    try:
        spec = importlib.util.find_spec(path)
        return spec is not None and spec.origin is not None  # a folder that was left behind empty has no origin
    except ModuleNotFoundError:  # not even the package around it
        return False


def test_the_new_paths_are_there_and_the_old_ones_are_not():
    old = {path for row in ROWS for path in re.findall("`(.*?)`", row[0])}
    new = {path for row in ROWS for path in re.findall("`(.*?)`", row[1])}
    assert len(old) == len(ROWS) > 25 and "jaxpaged.search" in old
    assert [path for path in new if not is_there(path)] == []
    assert [path for path in old if is_there(path)] == []
