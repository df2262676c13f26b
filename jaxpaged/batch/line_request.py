"""A record of an input file -> what it asks for: which of its values is the prompt, which are parameters, and what is
carried to its row.

An OpenAI batch line is one with a `custom_id`, or with another of OpenAI's keys and no prompt beside it. In any other
the prompt is what `--prompt-column` names, else the one of `prompt`, `prompt_token_ids` and `messages` that is there,
else `text`. A list of objects is a conversation under any of these names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxpaged.api.carried import carried_of
from jaxpaged.api.messages import OPTIONS
from jaxpaged.api.prompt_columns import DEFAULT_COLUMNS, PROMPT_KEYS, is_messages, prompt_column
from jaxpaged.api.values import check_encodable, shortened
from jaxpaged.batch.json_values import bias_from_json, is_id, is_token_list
from jaxpaged.batch.model_files import digest
from jaxpaged.batch.openai_chat import conversation_of
from jaxpaged.batch.openai_line import OPENAI_KEYS, openai_request
from jaxpaged.batch.records import Record
from jaxpaged.batch.requests import (
    PARAMETER_NAMES,
    BatchContext,
    BatchRequest,
    InvalidLine,
    Prompt,
    make_request,
)
from jaxpaged.batch.spelling import check_spelling
from jaxpaged.batch.tables import without_nothing

FLAG = "--prompt-column NAME"
#: What has a meaning beside the prompt.
OTHER_KEYS = ("id", "add_special_tokens", *PARAMETER_NAMES)
#: Columns of a table of text that hold more than text.
MEANT = frozenset((*PARAMETER_NAMES, *OPTIONS, "add_special_tokens", "prompt_token_ids", "messages", "body")) - {
    "chat_template"
}


def is_openai(values: Mapping[str, Any], context: BatchContext) -> bool:
    if "custom_id" in values:
        return True
    columns = DEFAULT_COLUMNS if context.prompt_column is None else (context.prompt_column,)
    return not OPENAI_KEYS.isdisjoint(values) and not any(name in values for name in columns)


class LineReader:
    """Reads the records of one file, whose custom ids have to differ."""

    def __init__(self, context: BatchContext, unit: str, is_table: bool):
        self._context = context
        self._unit = unit
        self._is_table = is_table
        self._custom_ids: dict[str, int] = {}  # -> number of the line

    def read(self, record: Record) -> BatchRequest | InvalidLine:
        try:
            request = self._request(record)
        except ValueError as error:
            return self._invalid(record, str(error))
        return request if self._unit == "line" else dataclasses.replace(request, unit=self._unit)

    def _request(self, record: Record) -> BatchRequest:
        index, context = record.index, self._context
        if record.problem is not None:
            raise ValueError(record.problem)
        if record.text is not None:
            check_encodable(record.text, "the text")
            return make_request(index, str(index), [record.text], {}, context)
        assert record.values is not None, "a record without a problem has a text or values"
        if is_openai(record.values, context):
            values = without_nothing(record.values) if self._is_table else record.values
            self._check_unique(values.get("custom_id"), index)
            return openai_request(index, values, context)
        return self._plain_request(index, record.values)

    def _invalid(self, record: Record, reason: str) -> InvalidLine:
        values, context = record.values or {}, self._context
        # A line that is no JSON has no keys, but the readers of an OpenAI file expect their own form of error.
        is_of_openai = is_openai(values, context) if values else '"custom_id"' in record.raw
        given_id = values.get("custom_id" if is_of_openai else "id")
        fingerprint = digest([record.index, record.raw, dict(context.params), context.options])
        try:
            carried = {} if is_of_openai else carried_of(values, self._used(values))
        except ValueError:
            carried = {}
        return InvalidLine(
            record.index, given_id if is_id(given_id) else None, reason, is_of_openai, fingerprint, carried, self._unit
        )

    def _check_unique(self, custom_id: object, index: int) -> None:
        if isinstance(custom_id, str):
            first = self._custom_ids.setdefault(custom_id, index + 1)
            if first != index + 1:
                raise ValueError(f"custom_id {shortened(custom_id)} is already that of {self._unit} {first}")

    def _plain_request(self, index: int, given: Mapping[str, Any]) -> BatchRequest:
        values = self._said(given) if self._is_table else given
        column = prompt_column(values, self._context.prompt_column, FLAG, self._unit)
        prompt = self._prompt(column, values)
        check_spelling(values, OTHER_KEYS)
        carried = carried_of(given, self._used(given))
        request_id = values.get("id")
        if request_id is None:
            request_id = str(index)
        elif not is_id(request_id):
            raise ValueError(f"id must be a string or an integer, got {shortened(request_id)}")
        params = {name: values[name] for name in PARAMETER_NAMES if name in values}
        if "logit_bias" in params:
            params["logit_bias"] = bias_from_json(params["logit_bias"])
        adds = values.get("add_special_tokens")
        return make_request(index, request_id, [prompt], params, self._context, None, adds, carried)

    def _said(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a row of a table says; of several columns that may have its prompt, those that have one."""
        said = without_nothing(given)
        if self._context.prompt_column is not None:
            return said
        return {name: value for name, value in said.items() if name not in PROMPT_KEYS or value not in ("", b"")}

    def _prompt(self, column: str, values: Mapping[str, Any]) -> Prompt:
        prompt = values[column]
        if isinstance(prompt, bytes):  # as Parquet files have texts that do not say so
            prompt = _decode(prompt)
        if column == "messages" or is_messages(prompt):
            if values.get("add_special_tokens") is not None:
                raise ValueError("add_special_tokens: the chat template writes those of messages, so leave it out")
            return conversation_of({**values, "messages": prompt}, self._context)
        foreign = [key for key in OPTIONS if values.get(key) is not None]
        if foreign and not self._is_table:
            raise ValueError(f"{foreign[0]} goes with messages, and the line has {column}")
        if column != "prompt_token_ids" and isinstance(prompt, str):
            check_encodable(prompt, shortened(column)[1:-1])
            return prompt
        if not is_token_list(prompt):
            wanted = "a list of token ids" if column == "prompt_token_ids" else "a string or a list of token ids"
            raise ValueError(f"{shortened(column)[1:-1]} must be {wanted}, got {shortened(prompt)}")
        return prompt

    def _used(self, values: Mapping[str, Any]) -> frozenset[str]:
        """The keys that are not carried, since they say what is asked for."""
        column = self._context.prompt_column
        prompts = {column} if column is not None else {key for key in PROMPT_KEYS if key in values} or {"text"}
        options = OPTIONS if not self._is_table or "messages" in prompts else ()
        return frozenset((*OTHER_KEYS, *options)) | prompts


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt is bytes, and not UTF-8: byte 0x{data[error.start]:02x}") from None
