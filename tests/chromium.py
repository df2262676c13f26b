"""Opens a page in headless Chromium, where there is one: its document when all is done, and what its console said."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Visit(NamedTuple):
    result: Any  # what the script left in window.result
    console: list[str]


def find_chromium() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def visit(chromium: str, page: str, script: str, directory: Path, size: str = "1280,900") -> Visit:
    """Open `page` with `script` behind its own; the script sets `window.result`, which must fit JSON."""
    leave = (
        "document.body.append(Object.assign(document.createElement('pre'),"
        "{id: 'result', textContent: JSON.stringify(window.result)}));"
    )
    file = directory / "page.html"
    file.write_text(page.replace("</body>", f"<script>{script}\n{leave}</script></body>"), encoding="utf-8")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [
            chromium, "--headless", *sandbox, "--disable-gpu", f"--user-data-dir={directory / 'profile'}",
            "--enable-logging=stderr", "--v=0", f"--window-size={size}", "--dump-dom", file.as_uri(),
        ],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Visit(json.loads(html.unescape(found[1])) if found else None, console)
