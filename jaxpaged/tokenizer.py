"""sentencepiece and tokenizers behind one small class, and text that grows with the tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

#: Tokens of the prompt that a continuation is decoded after, so that it begins with its own leading space.
CONTEXT_TOKENS = 8


class Tokenizer(Protocol):
    """What jaxpaged needs of a tokenizer; pass your own object with these methods as `LLM(tokenizer=...)`."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class SentencePieceTokenizer:
    """A `tokenizer.model` file."""

    def __init__(self, path: Path, add_bos: bool):
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self._add_bos = add_bos and self._model.bos_id() >= 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._model.encode(text, add_bos=self._add_bos and add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        # sentencepiece leaves control pieces out of the text; ids beyond its table are padding of the embedding.
        known = [i for i in token_ids if i < self._model.get_piece_size()]
        if skip_special_tokens:
            return self._model.decode(known)
        text, run = "", []
        for i in known:
            if self._model.is_control(i):
                text, run = text + self._model.decode(run) + self._model.id_to_piece(i), []
            else:
                run.append(i)
        return text + self._model.decode(run)


class JsonTokenizer:
    """A `tokenizer.json` file of Hugging Face's tokenizers library."""

    def __init__(self, path: Path):
        self._model = tokenizers.Tokenizer.from_file(str(path))
        self._model.no_truncation()  # some files bring the settings of their training
        self._model.no_padding()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._model.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._model.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


def find_tokenizer(given: str | Path | Tokenizer | None, found: Path | None) -> Tokenizer | None:
    """What the user gave, a path or an object, or else the file that was `found` with the model, if any."""
    if isinstance(given, str | Path):
        return load_tokenizer(given)
    if given is not None:
        if not (hasattr(given, "encode") and hasattr(given, "decode")):
            raise ValueError(f"tokenizer must be a path or have encode and decode, got {type(given).__name__}")
        return given
    return None if found is None else load_tokenizer(found)


def need_tokenizer(tokenizer: Tokenizer | None, what: str, missing: str) -> Tokenizer:
    """The tokenizer, or ValueError where there is none: what it is needed for ("text needs"), and what is missing."""
    if tokenizer is None:
        raise ValueError(f"{what} a tokenizer, and {missing}: give token ids, or name a tokenizer")
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """From a `tokenizer.json` or `tokenizer.model` file, or a directory that holds one."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"no tokenizer.json and no tokenizer.model in {path}")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer {path} does not exist")
    try:
        if path.suffix == ".json":
            return JsonTokenizer(path)
        return SentencePieceTokenizer(path, _wants_bos(path.parent))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a sentencepiece model: {error}") from None
    except Exception as error:  # the tokenizers library raises bare Exception for every malformed file
        if type(error) is not Exception:
            raise
        raise ValueError(f"{path} is not a tokenizers file: {error}") from None


def _wants_bos(directory: Path) -> bool:
    """Whether prompts begin with the beginning-of-sequence token: as tokenizer_config.json says, else yes."""
    config = directory / "tokenizer_config.json"
    return not config.is_file() or bool(json.loads(config.read_text()).get("add_bos_token", True))


def decode_continuation(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], output_ids: Sequence[int], skip_special_tokens: bool = True
) -> str:
    """The text that `output_ids` add to the prompt. Decoded alone, many tokenizers drop a first space."""
    context = list(prompt_ids[-CONTEXT_TOKENS:])
    before = tokenizer.decode(context, skip_special_tokens)
    return tokenizer.decode([*context, *output_ids], skip_special_tokens)[len(before) :]


def encode_continuation(tokenizer: Tokenizer, prompt_ids: Sequence[int], text: str) -> list[int]:
    """Token ids that add exactly `text` to the prompt; ValueError where none are found.

    Encoded alone, many tokenizers put a space before it; encoded with the prompt, it may merge with the last token.
    """
    whole = tokenizer.decode(prompt_ids) + text
    found = [tokenizer.encode(whole), tokenizer.encode(whole, add_special_tokens=False)]
    found = [ids[len(prompt_ids) :] for ids in found if ids[: len(prompt_ids)] == list(prompt_ids)]
    for ids in (*found, tokenizer.encode(text, add_special_tokens=False)):
        if ids and decode_continuation(tokenizer, prompt_ids, ids) == text:
            return ids
    raise ValueError(f"no token ids were found that add just {text!r} to a text with this end: give token ids")


def find_stop(text: str, stops: Sequence[str], searched: int = 0) -> tuple[int, str] | None:
    """Where the earliest stop string begins that ends behind the first `searched` characters, and which it is."""
    found = [(text.find(stop, max(0, searched - len(stop) + 1)), stop) for stop in stops]
    return min(((at, stop) for at, stop in found if at >= 0), key=lambda place: place[0], default=None)


class StopStringStream:
    """Text of one sample as its tokens come, watched for stop strings.

    A token may end in the middle of a character or change how its predecessors are written, so text is only taken over
    when it does not end in an incomplete character; each new piece is decoded behind the piece before it (as in vLLM).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stop: tuple[str, ...],
        include_stop: bool,
        skip_special_tokens: bool,
    ):
        self.text = ""
        self._tokenizer = tokenizer
        self._stop = stop
        self._include_stop = include_stop
        self._skip_special_tokens = skip_special_tokens
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._piece_start = 0  # the piece before: context for the next
        self._piece_end = len(self._ids)

    def push(self, token_id: int, *, may_stop: bool) -> str | None:
        """Take one more token; the stop string that its text completes, if `may_stop`. `text` then ends there."""
        self._ids.append(token_id)
        before = self._tokenizer.decode(self._ids[self._piece_start : self._piece_end], self._skip_special_tokens)
        after = self._tokenizer.decode(self._ids[self._piece_start :], self._skip_special_tokens)
        if len(after) <= len(before) or after.endswith("\ufffd"):
            return None
        searched = len(self.text)
        self.text += after[len(before) :]
        self._piece_start, self._piece_end = self._piece_end, len(self._ids)
        return self._find_stop(searched) if may_stop else None

    def _find_stop(self, searched: int) -> str | None:
        """Earliest stop string that ends behind `searched` characters of the text."""
        found = find_stop(self.text, self._stop, searched)
        if found is None:
            return None
        at, stop = found
        self.text = self.text[: at + len(stop) if self._include_stop else at]
        return stop
