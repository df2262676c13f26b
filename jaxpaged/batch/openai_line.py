"""OpenAI batch lines: what goes around a body, and which url's it is; openai.py and openai_chat.py read the bodies."""

from __future__ import annotations

from typing import Any

from jaxpaged.api.values import shortened
from jaxpaged.batch.json_values import check_keys
from jaxpaged.batch.openai import completion_request
from jaxpaged.batch.openai_chat import chat_request
from jaxpaged.batch.requests import BatchContext, BatchRequest

OPENAI_KEYS = frozenset(("custom_id", "method", "url", "body"))
READERS = {"/v1/completions": completion_request, "/v1/chat/completions": chat_request}


def openai_request(index: int, line: dict[str, Any], context: BatchContext) -> BatchRequest:
    check_keys(line, sorted(OPENAI_KEYS))
    if not isinstance(line.get("custom_id"), str):
        raise ValueError(f"custom_id must be a string, got {shortened(line.get('custom_id'))}")
    if line.get("method") != "POST":
        raise ValueError(f"method must be 'POST', got {shortened(line.get('method'))}")
    url = line.get("url")
    if not isinstance(url, str) or url not in READERS:
        raise ValueError(f"url {shortened(url)} is not supported: only {' and '.join(READERS)} are")
    if not isinstance(line.get("body"), dict):
        raise ValueError(f"body must be an object, got {shortened(line.get('body'))}")
    return READERS[url](index, line["custom_id"], line["body"], context)
