"""The chat templates of a model: from messages to the text that it was trained to read.

They are programs of jinja2 in `tokenizer_config.json` ("chat_template": one, or a list of named ones), or in
`chat_template.jinja` and `additional_chat_templates/*.jinja`, which go before it. What they write is what transformers
writes, special tokens included: so none are added when it is encoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from jaxpaged.api.messages import Conversation
from jaxpaged.text.added_tokens import CONFIG_NAME, read_named_tokens, read_object
from jaxpaged.text.template_process import SECONDS, TemplateProcess

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
#: Behind the text of a message that is to go on: what the template writes from there on is cut off. The blank at its
#: end goes where a template trims the message.
MARK = "CONTINUE_FINAL_MESSAGE_TAG "


class TemplateFiles(NamedTuple):
    """What stands in a directory."""

    templates: Mapping[str, str]  # by name; the usual one is "default"
    special_tokens: Mapping[str, str]  # bos_token, ...


class ChatTemplates:
    """The templates of one model, of the first of some directories that has any.

    They are read when they are first needed: who never chats needs none of their files.
    """

    def __init__(self, *directories: Path, seconds: float = SECONDS):
        self._directories = directories
        self._process = TemplateProcess(seconds)

    @cached_property
    def _files(self) -> TemplateFiles:
        found = map(read_template_files, self._directories)
        return next((files for files in found if files.templates), TemplateFiles({}, {}))

    def close(self) -> None:
        """End the process that renders; another conversation would start another."""
        self._process.close()

    def choose(self, given: str | None, has_tools: bool) -> str:
        """The template that was `given`, itself or by name, or the model's own; ValueError where there is none."""
        templates = self._files.templates
        if given is not None:
            return templates.get(given, given)
        for name in ("tool_use", "default") if has_tools else ("default",):
            if name in templates:
                return templates[name]
        if templates:
            raise ValueError(f"there is no default chat template: choose one of {', '.join(sorted(templates))}")
        raise ValueError(
            f"{self._directories[-1]} has no chat template, neither {TEMPLATE_FILE} nor one in {CONFIG_NAME}: its "
            "model may be none for chats; give one as chat_template (on the command line --chat-template FILE)"
        )

    def render(self, conversation: Conversation) -> str:
        """The text of a conversation, up to where the answer begins; ValueError for a template that fails."""
        template = self.choose(conversation.chat_template, conversation.tools is not None)
        messages = conversation.messages
        if conversation.continue_final_message:
            messages = [*messages[:-1], _marked(messages[-1])]
        text = self._process.render(
            template,
            {
                **self._files.special_tokens,
                **conversation.kwargs,
                "messages": messages,
                "tools": conversation.tools,
                "documents": conversation.documents,
                "add_generation_prompt": conversation.add_generation_prompt,
            },
        )
        if conversation.continue_final_message:
            text = _cut(text)
        if not text:
            raise ValueError("the chat template makes an empty text of these messages")
        return text


def find_chat_templates(tokenizer: object, directory: Path) -> ChatTemplates:
    """Those of a `tokenizer` that was given as a directory, if it has any, else those of the model's `directory`."""
    if isinstance(tokenizer, str | Path) and Path(tokenizer).is_dir():
        return ChatTemplates(Path(tokenizer), directory)
    return ChatTemplates(directory)


def read_template_files(directory: Path) -> TemplateFiles:
    """The templates and special tokens of a directory; a mistake in a file is a ValueError that names it."""
    files = {path.stem: path for path in sorted((directory / TEMPLATE_FOLDER).glob("*.jinja")) if path.is_file()}
    if (directory / TEMPLATE_FILE).is_file():
        files["default"] = directory / TEMPLATE_FILE
    templates = {name: _read_text(path) for name, path in files.items()}
    if not templates:
        given = read_object(directory / CONFIG_NAME).get("chat_template")
        templates = _named_templates(given, f"{directory / CONFIG_NAME}: chat_template")
    return TemplateFiles(templates, read_named_tokens(directory))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None


def _named_templates(given: Any, place: str) -> dict[str, str]:
    if given is None:
        return {}
    if isinstance(given, str):
        return {"default": given}
    entries = given if isinstance(given, list) else [given]
    for entry in entries:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("name", "template")):
            raise ValueError(f"{place} must be a template or a list of objects with name and template")
    return {entry["name"]: entry["template"] for entry in entries}


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content + MARK}
    return {**message, "content": [*content[:-1], {**content[-1], "text": content[-1]["text"] + MARK}]}


def _cut(text: str) -> str:
    place = text.rfind(MARK.strip())
    if place < 0:
        raise ValueError(
            "continue_final_message: the chat template leaves out the end of the last message, so nothing can follow it"
        )
    return text[:place] if text.startswith(MARK, place) else text[:place].rstrip()
