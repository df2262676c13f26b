"""Bytes of an input file -> one request or one error a line: the file's format is chosen by its content.

Where its name says nothing (input_formats.py), the first line that is not blank decides: if it begins with `{`, every
line is a JSON object, and a line that is not one is an error of that line, never a prompt; otherwise every line is a
prompt. `file_format` overrides the choice. In a JSON file each object is an OpenAI batch line if it has one of
`OPENAI_KEYS`, else `{"prompt": ..., parameters}` or `{"messages": ..., parameters}`. Blank lines are skipped and
counted. The line's end, and a byte order mark, are not part of a prompt; other blanks are.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any

from jaxpaged.api.messages import OPTIONS
from jaxpaged.api.values import check_encodable, shortened
from jaxpaged.batch.input_formats import check_beginning
from jaxpaged.batch.json_values import bias_from_json, check_keys, is_id, is_token_list, parse_object
from jaxpaged.batch.model_files import digest
from jaxpaged.batch.openai_chat import conversation_of
from jaxpaged.batch.openai_line import OPENAI_KEYS, openai_request
from jaxpaged.batch.requests import (
    PARAMETER_NAMES,
    BatchContext,
    BatchRequest,
    InvalidLine,
    Prompt,
    make_request,
)

FORMATS = ("auto", "text", "jsonl")
PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
LINE_KEYS = ("id", *PROMPT_KEYS, "add_special_tokens", *OPTIONS, *PARAMETER_NAMES)


def parse_batch(data: bytes, context: BatchContext, file_format: str = "auto") -> list[BatchRequest | InvalidLine]:
    """Every line that is not blank, in order. Raises ValueError where the file as a whole is of no known format."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("the input is UTF-16: save it as UTF-8")
    if file_format == "auto":
        check_beginning(data)
    lines = list(_numbered_lines(data.removeprefix(codecs.BOM_UTF8)))
    is_json = file_format == "jsonl" or (file_format == "auto" and _looks_like_json(lines))
    custom_ids: dict[str, int] = {}  # -> line number
    return [_parse_line(index, line, is_json, context, custom_ids) for index, line in lines]


def _numbered_lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    for index, line in enumerate(data.split(b"\n")):
        if line.strip():
            yield index, line.removesuffix(b"\r")


def _looks_like_json(lines: list[tuple[int, bytes]]) -> bool:
    first = lines[0][1].strip() if lines else b""
    if first == b"[" or first.startswith(b"[{"):
        raise ValueError(
            "the input is a JSON list: write one object a line (jq -c '.[]'), "
            "or say --format text if its lines are prompts"
        )
    return first.startswith(b"{")


def _parse_line(
    index: int, line: bytes, is_json: bool, context: BatchContext, custom_ids: dict[str, int]
) -> BatchRequest | InvalidLine:
    values: dict[str, Any] = {}
    try:
        text = _decode(line)
        if not is_json:
            return make_request(index, str(index), [text], {}, context)
        values, repeated = parse_object(text)
        if repeated:
            raise ValueError(f"the key {shortened(repeated[0])} is there twice")
        if OPENAI_KEYS.isdisjoint(values):
            return _parse_object(index, values, context)
        _check_unique(values.get("custom_id"), index, custom_ids)
        return openai_request(index, values, context)
    except ValueError as error:
        # A line that is no JSON has no keys, but the readers of an OpenAI file expect their own form of error.
        is_openai = not OPENAI_KEYS.isdisjoint(values) if values else b'"custom_id"' in line
        given_id = values.get("custom_id" if is_openai else "id")
        fingerprint = digest([index, line.decode("latin-1"), dict(context.params), context.options])
        return InvalidLine(index, given_id if is_id(given_id) else None, str(error), is_openai, fingerprint)


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}") from None


def _check_unique(custom_id: object, index: int, custom_ids: dict[str, int]) -> None:
    if isinstance(custom_id, str):
        first = custom_ids.setdefault(custom_id, index + 1)
        if first != index + 1:
            raise ValueError(f"custom_id {shortened(custom_id)} is already that of line {first}")


def _parse_object(index: int, values: dict[str, Any], context: BatchContext) -> BatchRequest:
    check_keys(values, LINE_KEYS)
    request_id = values.get("id")
    if request_id is None:
        request_id = str(index)
    elif not is_id(request_id):
        raise ValueError(f"id must be a string or an integer, got {shortened(request_id)}")
    params = {name: values[name] for name in PARAMETER_NAMES if name in values}
    if "logit_bias" in params:
        params["logit_bias"] = bias_from_json(params["logit_bias"])
    adds = values.get("add_special_tokens")
    return make_request(index, request_id, [_prompt(values, context)], params, context, add_special_tokens=adds)


def _prompt(values: dict[str, Any], context: BatchContext) -> Prompt:
    given = [key for key in PROMPT_KEYS if values.get(key) is not None]
    if len(given) != 1:
        has = " and ".join(given) or "none of them"
        raise ValueError(f"give one of prompt, prompt_token_ids and messages; the line has {has}")
    name = given[0]
    prompt = values[name]
    if name == "messages":
        if values.get("add_special_tokens") is not None:
            raise ValueError("add_special_tokens: the chat template writes those of messages, so leave it out")
        return conversation_of(values, context)
    if foreign := [key for key in OPTIONS if values.get(key) is not None]:
        raise ValueError(f"{foreign[0]} goes with messages, and the line has {name}")
    if name == "prompt" and isinstance(prompt, str):
        check_encodable(prompt, "prompt")
        return prompt
    if not is_token_list(prompt):
        wanted = "a string or a list of token ids" if name == "prompt" else "a list of token ids"
        raise ValueError(f"{name} must be {wanted}, got {shortened(prompt)}")
    return prompt
