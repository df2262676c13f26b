"""The forms in which a user may hand over prompts, read into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxpaged.tokenizer import Tokenizer, need_tokenizer


class Prompt(NamedTuple):
    """Text, or token ids; exactly one of them."""

    text: str | None
    token_ids: list[int] | None


def read_prompts(prompts: Any) -> list[Prompt]:
    """Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}, alone or in a list -> a list of `Prompt`.

    A flat list of integers is one prompt of token ids.
    """
    if is_one_prompt(prompts):
        return [read_prompt(prompts)]
    prompts = _as_list(prompts)
    if not isinstance(prompts, Sequence):
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
    prompts = _as_list(prompts)
    return isinstance(prompts, str | Mapping) or _are_token_ids(prompts)


def _as_list(value: Any) -> Any:
    """Arrays of token ids as lists; everything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _are_token_ids(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(hasattr(x, "__index__") and not isinstance(x, bool) for x in value)
    )


def read_prompt(prompt: Any) -> Prompt:
    """One prompt in any of its forms."""
    prompt = _as_list(prompt)
    if isinstance(prompt, Mapping):
        keys = set(prompt)
        if keys == {"prompt"}:
            prompt = prompt["prompt"]
            if not isinstance(prompt, str):
                raise ValueError(f'{{"prompt": ...}} takes text, got {prompt!r}')
        elif keys == {"prompt_token_ids"}:
            prompt = _as_list(prompt["prompt_token_ids"])
            if isinstance(prompt, str):
                raise ValueError('{"prompt_token_ids": ...} takes a list of integers, got text')
        else:
            raise ValueError(
                f'a prompt dict has the one key "prompt" or "prompt_token_ids", got {sorted(map(str, keys))}'
            )
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("the prompt is empty")
        return Prompt(prompt, None)
    if isinstance(prompt, Sequence) and len(prompt) == 0:
        raise ValueError("the prompt has no tokens")
    if not _are_token_ids(prompt):
        raise ValueError(f"a prompt must be text, a list of token ids or a dict, got {prompt!r}")
    return Prompt(None, [int(token_id) for token_id in prompt])


def prompt_token_ids(
    prompt: Prompt, tokenizer: Tokenizer | None, missing: str, add_special_tokens: bool = True
) -> list[int]:
    """The ids of a prompt, of which there is at least one; `missing` says why there may be no tokenizer for text."""
    if prompt.token_ids is not None:
        return prompt.token_ids
    assert prompt.text is not None
    token_ids = need_tokenizer(tokenizer, "a text prompt needs", missing).encode(
        prompt.text, add_special_tokens=add_special_tokens
    )
    if not token_ids:
        raise ValueError(f"the prompt {prompt.text!r} has no tokens")
    return token_ids
