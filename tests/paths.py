"""Where things of the repository are that tests read."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "goldens"
BUNDLED = ROOT / "jaxpaged" / "demo_model" / "tiny-python"
