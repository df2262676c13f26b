"""Keys that are a parameter's in all but spelling: taken for a note of the caller's, they would be passed over."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable

from jaxpaged.api.values import shortened

#: How others call parameters.
CALLED_ELSEWHERE = {
    "max_new_tokens": "max_tokens", "max_completion_tokens": "max_tokens", "max_length": "max_tokens",
    "num_return_sequences": "n", "num_beams": "beam_width", "stop_sequences": "stop", "top_logprobs": "logprobs",
}  # fmt: skip
#: How alike a key and a parameter are, from 0 to 1, that are taken for one and the same.
ALIKE = 0.9
MIN_LETTERS = 3


def check_spelling(keys: Iterable[str], parameters: tuple[str, ...]) -> None:
    """ValueError for a key that is a parameter's in all but spelling, or by another's name."""
    for key in keys:
        if key == "logits_processors":
            raise ValueError(f"unknown key {key!r}: processors are functions, which files cannot hold")
        if key not in parameters and (meant := _meant_by(key, parameters)):
            raise ValueError(
                f"unknown key {shortened(key)}; did you mean {meant}? A key of your own needs another name"
            )


@functools.lru_cache(maxsize=1000)  # lines of a file have the same keys
def _meant_by(key: str, parameters: tuple[str, ...]) -> str | None:
    if len(key) < MIN_LETTERS:
        return None
    close = difflib.get_close_matches(key.lower(), parameters, n=1, cutoff=ALIKE)
    same = [name for name in parameters if _letters(name) == _letters(key)]
    return next(iter([*same, *close]), CALLED_ELSEWHERE.get(key))


def _letters(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
