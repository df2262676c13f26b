"""`--chat-template FILE`, of the commands that answer messages."""

from __future__ import annotations

from pathlib import Path

from jaxpaged.cli.errors import usage_errors


def read_template(path: str | None) -> str | None:
    """The text of the template in a file; None where none was given."""
    if path is None:
        return None
    with usage_errors("--chat-template: "):
        text = Path(path).read_text(encoding="utf-8")
        if not text:
            raise ValueError(f"{path} is empty")
        return text
