"""One self-contained page that replays a trace (account/trace.py): no network, nothing to install. `jaxpaged trace`.

The page is page.html with its style, its scripts and the trace written into it; it may be mailed and opened as a file.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from jaxpaged.looks.palette import PARTS, SHARED, Look

#: What the page tells apart in a pool: token states that one table holds, those that several do, and the other parts.
LOOKS: dict[str, Look] = {
    "own": PARTS["used"], "shared": SHARED, "unfilled": PARTS["internal"],
    **{part: PARTS[part] for part in ("cached", "free", "reserved", "rounding")},
}  # fmt: skip
#: In the order in which they need each other: replay.js rebuilds the pool's state at any frame, the others draw it.
SCRIPTS = ("replay.js", "common.js", "pool.js", "tables.js", "words.js", "account.js", "page.js")


def make_page(trace: dict[str, Any]) -> str:
    """The page as text. Raises ValueError for a trace without a step."""
    if not trace["frames"]:
        raise ValueError("the trace has no steps, so there is nothing to show: record a run first")
    page = _read("page.html")
    page = page.replace("{{colours}}", _colours(), 1).replace("{{style}}", _read("page.css").strip(), 1)
    words = {name: look.word for name, look in LOOKS.items()}
    page = page.replace("{{looks}}", json.dumps({"words": words}), 1)
    page = page.replace("{{script}}", "\n".join(map(_read, SCRIPTS)).strip(), 1)
    # Inside <script> only "<" could end the element early, and JSON may write it in another way. The trace goes in
    # last: what looks like a place in it is text.
    return page.replace("{{trace}}", dump_trace(trace).replace("<", "\\u003c"), 1)


def _colours() -> str:
    """The palette as variables of the style, on a light and on a dark ground."""
    light = " ".join(f"--{name}: {look.colour};" for name, look in LOOKS.items())
    dark = " ".join(f"--{name}: {look.dark};" for name, look in LOOKS.items())
    by_system = f'@media (prefers-color-scheme: dark) {{ :root:not([data-theme="light"]) {{ {dark} }} }}'
    return f':root {{ {light} }}\n{by_system}\n:root[data-theme="dark"] {{ {dark} }}'


def dump_trace(trace: dict[str, Any]) -> str:
    return json.dumps(trace, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def example_names() -> list[str]:
    return sorted(file.name.removesuffix(".json") for file in (files(__name__) / "examples").iterdir())


def example_trace(name: str) -> dict[str, Any]:
    """A bundled trace: a figure of the PagedAttention paper, or one of `example_names()`."""
    return json.loads(_read(f"examples/{name}.json"))


def _read(name: str) -> str:
    return (files(__name__) / name).read_text(encoding="utf-8")
