"""The forms in which a user may hand over prompts, read into one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

from jaxpaged.api.messages import Conversation, read_conversation
from jaxpaged.api.values import TEXT_AND_BYTES, as_int, check_encodable, is_list, shortened, unpacked
from jaxpaged.text.tokenizer import Tokenizer, need_tokenizer

logger = logging.getLogger("jaxpaged")


class Prompt(NamedTuple):
    """Text, token ids, or the messages of a conversation; exactly one of them."""

    text: str | None
    token_ids: list[int] | None
    add_special_tokens: bool | None = None  # None: as the call says for all
    conversation: Conversation | None = None  # becomes text by the model's chat template


def read_prompts(prompts: Any) -> list[Prompt]:
    """Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}, alone or in a list -> a list of `Prompt`.

    A flat list of integers is one prompt of token ids. Beside a "prompt" there may be its own "add_special_tokens".
    {"messages": [...]} is a conversation, with what else its chat template gets beside it (api/messages.py).
    """
    if is_one_prompt(prompts):
        return [read_prompt(prompts)]
    prompts = unpacked(prompts)
    if not is_list(prompts):
        raise ValueError(f"prompts must be text, token ids, a dict or a list of these, got {type(prompts).__name__}")
    read = []
    for i, prompt in enumerate(prompts):
        try:
            read.append(read_prompt(prompt))
        except ValueError as error:
            raise ValueError(f"prompt {i}: {error}") from None
    return read


def is_one_prompt(prompts: Any) -> bool:
    """Whether `read_prompts` takes this for a single prompt, not for a list of them."""
    prompts = unpacked(prompts)
    return isinstance(prompts, str | Mapping) or _are_token_ids(prompts)


def _are_token_ids(value: Any) -> bool:
    return is_list(value) and len(value) > 0 and all(as_int(x) is not None for x in value)


def read_prompt(prompt: Any) -> Prompt:
    """One prompt in any of its forms."""
    add_special_tokens = None
    if isinstance(prompt, Mapping):
        keys = set(prompt)
        if "messages" in keys:
            return Prompt(None, None, False, read_conversation(prompt))
        if "prompt" in keys and "add_special_tokens" in keys:
            add_special_tokens = prompt["add_special_tokens"]
            check_add_special_tokens(add_special_tokens)
            keys.remove("add_special_tokens")
        if keys == {"prompt"}:
            prompt = prompt["prompt"]
            if not isinstance(prompt, str):
                raise ValueError(f'{{"prompt": ...}} takes text, got {shortened(prompt)}')
        elif keys == {"prompt_token_ids"}:
            prompt = prompt["prompt_token_ids"]
            if isinstance(prompt, str):
                raise ValueError('{"prompt_token_ids": ...} takes a list of integers, got text')
        else:
            raise ValueError(
                'a prompt dict has the key "prompt" (also with "add_special_tokens"), "prompt_token_ids" or "messages"'
                f", got {shortened(list(prompt))}"
            )
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("the prompt is empty")
        check_encodable(prompt, "the prompt")
        return Prompt(prompt, None, add_special_tokens)
    return Prompt(None, _read_token_ids(unpacked(prompt)))


def _read_token_ids(values: Any) -> list[int]:
    if isinstance(values, TEXT_AND_BYTES):
        raise ValueError(f"a prompt is text or token ids, not bytes: decode {shortened(values)} to text")
    if not is_list(values):
        raise ValueError(f"a prompt must be text, a list of token ids or a dict, got {shortened(values)}")
    if len(values) == 0:
        raise ValueError("the prompt has no tokens")
    token_ids = [as_int(value) for value in values]
    if None in token_ids:
        wrong = shortened(values[token_ids.index(None)])
        raise ValueError(f"a prompt must be text, a list of token ids or a dict, got a list that has {wrong}")
    return token_ids  # type: ignore[return-value]


def check_add_special_tokens(value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"add_special_tokens must be True or False, got {shortened(value)}")


class PromptEncoder:
    """Prompts to token ids; `missing` says why there may be no tokenizer for text."""

    def __init__(self, tokenizer: Tokenizer | None, missing: str):
        self.tokenizer = tokenizer
        self._missing = missing
        self._has_warned = False

    def encode(self, prompt: Prompt, add_special_tokens: bool = True) -> list[int]:
        """The ids of a prompt, of which there is at least one."""
        if prompt.token_ids is not None:
            return prompt.token_ids
        if prompt.conversation is not None:
            raise ValueError("messages are a prompt of generate and chat alone: give text or token ids here")
        assert prompt.text is not None
        if add_special_tokens:
            self._warn_of_second_start(prompt.text)
        return self._encode(prompt.text, add_special_tokens)

    def encode_prefix(self, prompt: Prompt, add_special_tokens: bool) -> list[int]:
        """The ids of what comes before prompts: with the special tokens of a text's start, without those of its end."""
        ids = self.encode(prompt, add_special_tokens)
        if prompt.text is not None and add_special_tokens and (num_last := len(self._around[1])):
            return ids[:-num_last]
        return ids

    def encode_behind(self, prompt: Prompt, add_special_tokens: bool) -> list[int]:
        """The ids of a prompt behind a prefix: without the special tokens of a text's start."""
        if prompt.text is None:
            return self.encode(prompt)
        return self._encode(prompt.text, False) + (self._around[1] if add_special_tokens else [])

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        tokenizer = need_tokenizer(self.tokenizer, "a text prompt needs", self._missing)
        token_ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if not token_ids:
            raise ValueError(f"the prompt {shortened(text)} has no tokens")
        return token_ids

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """The special tokens that are put before and behind a text."""
        tokenizer = need_tokenizer(self.tokenizer, "a text prompt needs", self._missing)
        plain, whole = (list(tokenizer.encode("a", add_special_tokens=adds)) for adds in (False, True))
        for start in range(len(whole) - len(plain) + 1) if plain else ():
            if whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
        return [], []

    def _warn_of_second_start(self, text: str) -> None:
        if self._has_warned or self.tokenizer is None or not (first := self._around[0][:1]):
            return
        start = self.tokenizer.decode(first, False)
        if start and text.startswith(start):
            self._has_warned = True
            logger.warning(
                "a prompt begins with %r, which the tokenizer puts before every prompt, too: "
                "leave it out, or say add_special_tokens=False (on the command line --no-special-tokens)",
                start,
            )
