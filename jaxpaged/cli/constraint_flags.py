"""`--trie`, `--json-schema`, `--regex` and `--grammar`: what outputs are limited to, of which a command takes one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from jaxpaged.api.constraint import read_constraint
from jaxpaged.cli.errors import UsageError, usage_errors
from jaxpaged.cli.flags import Flag
from jaxpaged.text.matching import check_constraint

CONSTRAINT_FLAGS = (
    Flag("trie", str, "a file of items, a line of JSON each (token ids or text): every output is one of them"),
    Flag("json_schema", str, "a file with a JSON schema, of which every output is"),
    Flag("regex", str, "a regular expression, which every output matches"),
    Flag("grammar", str, "a file with a grammar in Lark's form, of which every output is a sentence"),
)


def option_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def given_constraint(args: argparse.Namespace) -> dict[str, Any]:
    """{"constraint": ...} as a line of a batch file says it, or nothing; what can be refused without a model is."""
    given = {flag.name: getattr(args, flag.name) for flag in CONSTRAINT_FLAGS if hasattr(args, flag.name)}
    if len(given) > 1:
        options = " and ".join(map(option_of, given))
        raise UsageError(f"{options} both say what outputs are to be: give one of them")
    for name, value in given.items():
        with usage_errors(f"{option_of(name)}: "):
            constraint = {name: _read(name, value)}
            if name == "trie":
                if not Path(value).is_file():
                    raise ValueError(f"{value} is no file")
            elif (read := read_constraint(constraint)) is not None:
                check_constraint(read)
        return {"constraint": constraint}
    return {}


def constraint_files(args: argparse.Namespace) -> dict[str, str]:
    """The files that are read, by their flags."""
    names = [flag.name for flag in CONSTRAINT_FLAGS if flag.name != "regex"]
    return {option_of(name): getattr(args, name) for name in names if hasattr(args, name)}


def _read(name: str, value: str) -> Any:
    if name in ("trie", "regex"):
        return value
    text = Path(value).read_text(encoding="utf-8")
    return json.loads(text) if name == "json_schema" else text
