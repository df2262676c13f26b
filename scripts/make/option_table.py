"""Writes the table of the engine's options into docs/guide.md, from the options themselves.

python scripts/make/option_table.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from jaxpaged.config.options import Option, engine_options

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
HEAD = "| option | default | meaning |\n| --- | --- | --- |\n"


def option_table() -> str:
    return HEAD + "".join(map(_line, engine_options()))


def _line(option: Option) -> str:
    default = f'"{option.default}"' if option.kind is str else option.default_text
    named = f"`{default}`" if not option.unset else default
    quoted = ", ".join(f'`"{choice}"`' for choice in option.choices)
    choices = f"; one of {quoted}" if quoted else ""
    return f"| `{option.name}` | {named} | {option.help}{choices} |\n"


def table_in(page: str) -> str:
    """The table as the page has it."""
    (found,) = re.findall(re.escape(HEAD) + r"(?:\|.*\n)+", page)
    return found


def main() -> int:
    page = GUIDE.read_text(encoding="utf-8")
    GUIDE.write_text(page.replace(table_in(page), option_table()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
