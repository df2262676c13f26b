"""Text of a token as a code editor shows it: no space, tab or line end is invisible."""

from __future__ import annotations

_SIGNS = {" ": "·", "\t": "→", "\n": "↵", "\r": "␍", "\u00a0": "⍽"}


def visible(text: str, longest: int | None = None) -> str:
    """Text in one line, signs in place of whitespace; of one that is longer its beginning. Nothing is "∅"."""
    shown = "".join(_SIGNS.get(char) or (char if char.isprintable() else repr(char)[1:-1]) for char in text) or "∅"
    return shown if longest is None or len(shown) <= longest else shown[: longest - 1] + "…"
