"""The JSON files beside a `tokenizer.model`: tokens added to its own, and what goes around a prompt.

`tokenizer_config.json` (`added_tokens_decoder`, `add_bos_token`, ...), `added_tokens.json` and
`special_tokens_map.json`, read as transformers 5 reads them. A mistake in one is a ValueError that names the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

CONFIG_NAME = "tokenizer_config.json"
ADDED_NAME = "added_tokens.json"
MAP_NAME = "special_tokens_map.json"
#: What belongs to a tokenizer.model and is not in it.
COMPANIONS = (CONFIG_NAME, ADDED_NAME, MAP_NAME)
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
NAMED_LISTS = ("additional_special_tokens", "extra_special_tokens")
FLAGS = ("special", "lstrip", "rstrip", "single_word")


class AddedToken(NamedTuple):
    content: str  # what stands for it in a text
    special: bool = False  # left out of texts with skip_special_tokens
    lstrip: bool = False  # takes blanks before it, or behind it, with it
    rstrip: bool = False
    single_word: bool = False  # not inside a word


class TokenizerSettings(NamedTuple):
    """What the files say; without files what holds for a bare model."""

    added: dict[int, AddedToken] = {}
    special: dict[str, AddedToken] = {}  # named as special; their ids are the model's own, or those in `added`
    names: dict[str, str | None] = {}  # bos_token, eos_token -> content; None: the files say that there is none
    add_bos: bool = True
    add_eos: bool = False
    legacy: bool = False  # a space goes before every part of a text between added tokens, not only before the first


def read_settings(directory: Path) -> TokenizerSettings:
    config = read_object(directory / CONFIG_NAME)
    named = _named(directory, config)
    with_path = f"{directory / CONFIG_NAME} or {MAP_NAME}"
    special = {token.content: token for token in _special_tokens(named, with_path)}
    added = _added_tokens(config.get("added_tokens_decoder"), directory / CONFIG_NAME)
    contents = {token.content for token in added.values()}
    for content, token_id in read_object(directory / ADDED_NAME).items():
        _check_added(content, token_id, directory / ADDED_NAME)
        if content not in contents:
            added.setdefault(token_id, special.get(content, AddedToken(content)))
    return TokenizerSettings(
        {i: token._replace(special=True) if token.content in special else token for i, token in added.items()},
        special,
        {name: _content(named[name], name, with_path) for name in ("bos_token", "eos_token") if name in named},
        *(_switch(config, name, default, directory) for name, default in
          (("add_bos_token", True), ("add_eos_token", False), ("legacy", False))),
    )  # fmt: skip


def read_named_tokens(directory: Path) -> dict[str, str]:
    """bos_token, eos_token, ... -> content, of those that the files name; as chat templates know them."""
    named, place = _named(directory, read_object(directory / CONFIG_NAME)), f"{directory / CONFIG_NAME} or {MAP_NAME}"
    contents = {name: _content(named.get(name), name, place) for name in NAMED}
    return {name: content for name, content in contents.items() if content is not None}


def _named(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: config[name] for name in (*NAMED, *NAMED_LISTS) if name in config}
    return {**read_object(directory / MAP_NAME), **own}


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty without the file."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return values


def _switch(config: Mapping[str, Any], name: str, default: bool, directory: Path) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{directory / CONFIG_NAME}: {name} must be true or false, got {value!r:.60}")
    return default if value is None else value


def _added_tokens(decoder: Any, path: Path) -> dict[int, AddedToken]:
    if decoder is None:
        return {}
    if not isinstance(decoder, dict):
        raise ValueError(f"{path}: added_tokens_decoder must be an object of token ids, got {decoder!r:.60}")
    added = {}
    for key, value in decoder.items():
        if not re.fullmatch("[0-9]{1,9}", key) or not isinstance(value, dict):
            raise ValueError(f"{path}: added_tokens_decoder has {key!r:.60}: {value!r:.60}; wanted an id and an object")
        added[int(key)] = _token(value, f"{path}: token {key} of added_tokens_decoder")
    return added


def _check_added(content: str, token_id: Any, path: Path) -> None:
    if not content or type(token_id) is not int or token_id < 0:
        raise ValueError(f"{path}: the id of {content!r:.60} must be an integer of at least 0, got {token_id!r:.60}")


def _token(value: Mapping[str, Any], place: str) -> AddedToken:
    content = value.get("content")
    if not isinstance(content, str) or not content:
        raise ValueError(f"{place} has no text as its content, but {content!r:.60}")
    flags = {name: value.get(name, False) for name in FLAGS}
    if wrong := [name for name, flag in flags.items() if not isinstance(flag, bool)]:
        raise ValueError(f"{place}: {wrong[0]} must be true or false, got {flags[wrong[0]]!r:.60}")
    return AddedToken(content, **flags)


def _special_tokens(named: Mapping[str, Any], place: str) -> Iterable[AddedToken]:
    for name in NAMED:
        if (content := _content(named.get(name), name, place)) is not None:
            value = named[name]
            token = _token(value, f"{place}: {name}") if isinstance(value, dict) else AddedToken(content)
            yield token._replace(special=True)
    for name in NAMED_LISTS:
        tokens = named.get(name) or []
        if not isinstance(tokens, list | dict):
            raise ValueError(f"{place}: {name} must be a list, got {tokens!r:.60}")
        for value in tokens.values() if isinstance(tokens, dict) else tokens:
            if (content := _content(value, name, place)) is not None:
                yield AddedToken(content, special=True)


def _content(value: Any, name: str, place: str) -> str | None:
    if isinstance(value, dict):
        return _token(value, f"{place}: {name}").content
    if value is not None and (not isinstance(value, str) or not value):
        raise ValueError(f"{place}: {name} must be the text of a token, got {value!r:.60}")
    return value
