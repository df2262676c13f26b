"""A `.json` file -> records: a list of objects or prompts, one object, or, as such files often are, JSON lines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from jaxpaged.api.values import shortened
from jaxpaged.batch.json_values import pairs_hook, parse_object
from jaxpaged.batch.records import Record, cut_record, not_utf8

_BLANKS = re.compile(r"[ \t\r\n]*")


def has_a_line_each(text: str) -> bool:
    """Whether the first line is an object, with more behind it."""
    first, _, rest = text.strip().partition("\n")
    if not first.startswith("{") or not rest.strip():
        return False
    try:
        parse_object(first)
    except ValueError:
        return False
    return True


def document_records(text: str, cut: str | None) -> Iterator[Record]:
    """The elements of a list, or the one object that there is. Behind what is no JSON nothing more is found."""
    start = _after_blanks(text, 0)
    if start == len(text):
        if cut is not None:
            yield cut_record(0, cut, "row")
        return
    is_list = text[start] == "["
    index, place, is_closed = 0, start + is_list, False
    while not is_closed:
        place = _after_blanks(text, place)
        if is_list and text[place : place + 1] == "]":
            place += 1
            break
        record, end, problem = _element(text, place, index)
        if record is not None:
            yield record
            index += 1
        if problem is None and is_list:
            end = _after_blanks(text, end)
            if text[end : end + 1] not in (",", "]"):
                problem = f"neither a comma nor the list's end {_at(text, end)}"
            end += text[end : end + 1] == ","
        if problem is not None:
            yield cut_record(index, cut or f"the file is no JSON from here on: {problem}", "row")
            return
        place, is_closed = end, not is_list
    if _after_blanks(text, place) != len(text):
        yield cut_record(index, f"the file goes on behind its end, {_at(text, place)}", "row")


def _element(text: str, place: int, index: int) -> tuple[Record | None, int, str | None]:
    """One element and the place behind it; or None and what is wrong with it."""
    repeated: list[str] = []
    too_long: list[int] = []  # numbers that Python refuses; the rest of the element, and of the list, can be read
    decoder = json.JSONDecoder(object_pairs_hook=pairs_hook(repeated), parse_int=_integers(too_long))
    try:
        value, end = decoder.raw_decode(text, place)
    except json.JSONDecodeError as error:
        return None, place, f"{error.msg} {_at(text, error.pos)}"
    except RecursionError as error:  # brackets thousands deep
        return None, place, str(error)
    raw = text[place:end]
    if isinstance(value, int | float) and not _is_ended(text, end):
        return None, place, f"a number that ends with the file {_at(text, place)}"
    problem = not_utf8(raw) or (f"the key {shortened(repeated[0])} is there twice" if repeated else None)
    if too_long:
        problem = f"JSON that cannot be read: an integer of {too_long[0]} digits"
    return _record(index, raw, value, problem), end, None


def _integers(too_long: list[int]) -> Callable[[str], int]:
    def read(digits: str) -> int:
        try:
            return int(digits)
        except ValueError:
            too_long.append(len(digits))
            return 0

    return read


def _record(index: int, raw: str, value: Any, problem: str | None) -> Record:
    if isinstance(value, str):
        return Record(index, raw, text=value, problem=problem)
    if isinstance(value, list):
        value = {"prompt": value}
    if not isinstance(value, dict):
        return Record(index, raw, problem=f"a row is an object, a text or a list of token ids, got {shortened(value)}")
    return Record(index, raw, values=value, problem=problem)


def _is_ended(text: str, end: int) -> bool:
    return _after_blanks(text, end) < len(text)


def _after_blanks(text: str, place: int) -> int:
    match = _BLANKS.match(text, place)
    assert match is not None, "an empty run of blanks matches"
    return match.end()


def _at(text: str, place: int) -> str:
    before = text[:place]
    return f"at line {before.count(chr(10)) + 1}, column {place - before.rfind(chr(10))}"
