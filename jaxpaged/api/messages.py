"""A conversation as people hand it over, read into plain values; what is wrong is named by its message and key.

Nothing of it is turned into text here: which words go around a message is the model's chat template's to say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxpaged.api.values import check_encodable, is_list, read_flag, shortened

#: What may stand beside "messages" in a prompt.
OPTIONS = (
    "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message", "chat_template_kwargs",
)  # fmt: skip
#: Variables of a template that are arguments of their own.
_OWN = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
#: What an assistant thought has several names; templates read the first or the second.
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")


class Conversation(NamedTuple):
    """Messages and what else a chat template is given."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None  # the template itself, or the name of one of the model's
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    kwargs: Mapping[str, Any] = {}


def is_conversation(value: Any) -> bool:
    """Whether this is a list of messages, not a list of such lists."""
    return not is_list(value) or not value or not is_list(value[0])


def read_conversation(given: Mapping[str, Any]) -> Conversation:
    """{"messages": [...]} and any of `OPTIONS`; None stands for what is not there."""
    if unknown := [key for key in given if key not in ("messages", *OPTIONS)]:
        known = ", ".join(OPTIONS)
        raise ValueError(f"{shortened(unknown[0])} does not go with messages, only {known} do")
    values = {name: value for name, value in given.items() if value is not None}
    continues = read_flag("continue_final_message", values.get("continue_final_message", False))
    adds = read_flag("add_generation_prompt", values.get("add_generation_prompt", not continues))
    if adds and continues:
        raise ValueError("add_generation_prompt begins a new message, continue_final_message none: choose one of them")
    template = values.get("chat_template")
    if template is not None and (not isinstance(template, str) or not template):
        raise ValueError(f"chat_template must be the text of a template or a name, got {shortened(template)}")
    messages = read_messages(values.get("messages"))
    if continues and not messages[-1].get("content"):
        raise ValueError("continue_final_message: the last message has no content to go on with")
    return Conversation(
        messages, _objects("tools", values), _objects("documents", values), template, adds, continues,
        _read_kwargs(values.get("chat_template_kwargs", {})),
    )  # fmt: skip


def read_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages of plain values; keys that are None are left out, as transformers does."""
    if not is_list(messages):
        raise ValueError(f"messages must be a list of objects with a role and a content, got {shortened(messages)}")
    if not messages:
        raise ValueError("messages is empty: there is nothing to answer")
    return [_read_message(f"message {i}", message) for i, message in enumerate(messages)]


def _read_message(place: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{place} must be an object with a role and a content, got {shortened(message)}")
    values = {key: value for key, value in message.items() if value is not None}
    role = values.get("role")
    if not isinstance(role, str) or not role:
        said = "has no role" if role is None else f"has the role {shortened(role)}"
        raise ValueError(f"{place} {said}: a role is a text, such as system, user or assistant")
    if "content" in values:
        values["content"] = _read_content(place, values["content"])
    elif "tool_calls" not in values:
        raise ValueError(f"{place} has no content, and no tool_calls, which alone can do without")
    if "tool_calls" in values:
        values["tool_calls"] = [
            _read_call(f"{place}: tool call {i}", call) for i, call in enumerate(_list(f"{place}: tool_calls", values))
        ]
    thought = next((values[name] for name in _THOUGHTS if name in values), None)
    if thought is not None:
        values = {"thinking": thought, **values, "reasoning_content": thought}
    return plain(place, values)


def _list(place: str, values: Mapping[str, Any]) -> list[Any]:
    given = values[place.rpartition(" ")[2]]
    if not is_list(given):
        raise ValueError(f"{place} must be a list, got {shortened(given)}")
    return list(given)


def _read_content(place: str, content: Any) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        check_encodable(content, f"{place}: content")
        return content
    if not is_list(content):
        raise ValueError(f"{place}: content must be a text or a list of parts, got {shortened(content)}")
    return [_read_part(f"{place}: part {i} of its content", part) for i, part in enumerate(content)]


def _read_part(place: str, part: Any) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise ValueError(f'{place} must be an object such as {{"type": "text", "text": ...}}, got {shortened(part)}')
    if part.get("type") != "text":
        raise ValueError(
            f'{place} is of type {shortened(part.get("type"))}: only "text" is possible, since jaxpaged runs models '
            "of text alone"
        )
    if not isinstance(part.get("text"), str):
        raise ValueError(f"{place} has no text, but {shortened(part.get('text'))}")
    check_encodable(part["text"], place)
    return dict(part)


def _read_call(place: str, call: Any) -> dict[str, Any]:
    """A tool call whose arguments, which services write as text of JSON, are the object that templates expect."""
    if not isinstance(call, Mapping):
        raise ValueError(f"{place} must be an object, got {shortened(call)}")
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        raise ValueError(f"{place}: its arguments are no JSON: {shortened(function['arguments'])}") from None
    return {**call, "function": {**function, "arguments": arguments}}


def _objects(name: str, values: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    if name not in values:
        return None
    for i, value in enumerate(_list(name, values)):
        if not isinstance(value, Mapping):
            wanted = "a JSON schema" if name == "tools" else "its title and text"
            raise ValueError(f"{name}: number {i} must be an object, {wanted}, got {shortened(value)}")
    return plain(name, list(values[name]))


def _read_kwargs(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"chat_template_kwargs must be an object of names and values, got {shortened(given)}")
    if taken := [name for name in given if name in _OWN]:
        raise ValueError(f"chat_template_kwargs has {taken[0]}, which is an argument of its own: give it there")
    return plain("chat_template_kwargs", dict(given))


def plain(place: str, value: Any) -> Any:
    """A copy of a value that JSON can hold: templates see nothing else."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{place} must be of plain values, as JSON has them: {error}") from None
