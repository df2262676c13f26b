"""What a user may limit the tokens of a request to, as it is written down: read, and looked at by its form alone.

Whether a regular expression, schema or grammar can be followed is for the library to say that follows it, with the
model's tokenizer (text/matching.py); what a trie holds is in trie.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxpaged.api.values import check_encodable, read_path, shortened

#: Longer ones take seconds to read, and minutes to follow.
MAX_CHARACTERS = 1_000_000


class Constraint:
    """What limits the output of a request; `jaxpaged.constraints` has the kinds."""

    def as_json(self) -> dict[str, Any]:
        """As a line of a batch file says it."""
        raise ValueError(f"a {type(self).__name__} cannot be written in a file: name the file it comes from")


@dataclass(frozen=True)
class Regex(Constraint):
    """The text of an output matches this regular expression, as a whole (Rust's syntax: no look-around, no references).

    A space before the text is part of it.
    """

    pattern: str

    def __post_init__(self):
        _check_text("regex", self.pattern)

    def as_json(self) -> dict[str, Any]:
        return {"regex": self.pattern}


@dataclass(frozen=True)
class JsonSchema(Constraint):
    """The text of an output is JSON of this schema (an object, or its JSON text), without blanks between its parts."""

    schema: Any

    def __post_init__(self):
        object.__setattr__(self, "schema", _read_schema(self.schema))

    def as_json(self) -> dict[str, Any]:
        return {"json_schema": json.loads(self.schema)}


@dataclass(frozen=True)
class Grammar(Constraint):
    """The text of an output is a sentence of this grammar, in the form of Lark that llguidance reads."""

    text: str

    def __post_init__(self):
        _check_text("grammar", self.text)

    def as_json(self) -> dict[str, Any]:
        return {"grammar": self.text}


@dataclass(frozen=True)
class TrieFile(Constraint):
    """An output is one of the items of this file: a line of JSON each, a list of token ids or text."""

    path: str

    def __post_init__(self):
        object.__setattr__(self, "path", str(read_path("trie", self.path)))

    def as_json(self) -> dict[str, Any]:
        return {"trie": self.path}


KINDS: dict[str, type[Any]] = {"regex": Regex, "json_schema": JsonSchema, "grammar": Grammar, "trie": TrieFile}


def read_constraint(value: Any) -> Constraint | None:
    """A constraint, or an object of JSON with the one key that says its kind, as in {"regex": "[0-9]+"}."""
    if value is None or isinstance(value, Constraint):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(
            f"constraint must be a Trie, Regex, JsonSchema or Grammar of jaxpaged.constraints, got {shortened(value)}"
        )
    if len(value) != 1 or (kind := next(iter(value))) not in KINDS:
        raise ValueError(f"constraint must have one of the keys {', '.join(KINDS)}, got {shortened(dict(value))}")
    return KINDS[kind](value[kind])


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} must be text, got {shortened(text)}")
    check_encodable(text, name)
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{name} has {len(text)} characters, and {MAX_CHARACTERS} are possible")


def _read_schema(given: Any) -> str:
    """As text, always the same for the same schema."""
    if isinstance(given, str):
        _check_text("json_schema", given)
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"json_schema is no JSON: {error}") from None
    if not isinstance(given, Mapping):
        raise ValueError(f"json_schema must be an object, got {shortened(given)}")
    try:
        text = json.dumps(dict(given), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"json_schema is no JSON: {error}") from None
    _check_text("json_schema", text)
    return text
