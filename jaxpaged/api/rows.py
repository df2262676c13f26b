"""Rows of a table as prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rows:
    """A prompt a row, which `generate` and `generate_iter` take; what else a row has is its result's `carried`.

    Attributes:
        table: a Hugging Face dataset, a DataFrame, an Arrow table, or any iterable of dicts.
        prompt_column: the name of the column with the prompts; None: prompt, prompt_token_ids, messages or text.
    """

    table: Any
    prompt_column: str | None = None
