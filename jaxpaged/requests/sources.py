"""Prompts as they come: a list, a generator, a dataset, a table. Each is read when it is asked for, and not before.

Nothing here imports what it reads: a dataset of Hugging Face is what has `column_names` and `features`, a DataFrame of
pandas what has `itertuples`, a table of Arrow what has `to_batches`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxpaged.api.messages import OPTIONS, read_conversation
from jaxpaged.api.prompt_columns import check_columns, is_messages, prompt_column
from jaxpaged.api.rows import Rows
from jaxpaged.api.values import TEXT_AND_BYTES, is_list, shortened, unpacked
from jaxpaged.requests.prompts import Prompt, is_one_prompt, read_prompt

FLAG = "Rows(table, prompt_column=...)"


class PromptSource(NamedTuple):
    """Prompts, or rows of a table that have one each, in order."""

    items: Iterable[Any]
    has_rows: bool = False
    column: str | None = None  # of rows
    is_lazy: bool = False  # they need not stand in memory
    is_one: bool = False


class ReadPrompt(NamedTuple):
    """A prompt, and what its row had besides."""

    prompt: Prompt
    carried: Mapping[str, Any]


def open_source(prompts: Any) -> PromptSource:
    """ValueError for what gives no prompts, or not in an order, and for a table without the column."""
    if isinstance(prompts, Rows):
        return _open_rows(prompts)
    if (table := _open_table(prompts, None)) is not None:
        return table
    if is_one_prompt(prompts):
        return PromptSource([prompts], is_one=True)
    items, is_lazy = _open_iterable(prompts)
    return PromptSource(items, is_lazy=is_lazy)


def _open_rows(rows: Rows) -> PromptSource:
    column = rows.prompt_column
    if column is not None and not isinstance(column, str):
        raise ValueError(f"prompt_column must be the name of a column, got {shortened(column)}")
    if (table := _open_table(rows.table, column)) is not None:
        return table
    if isinstance(rows.table, Mapping):
        raise ValueError("Rows takes rows, and this is one dict: put it into a list, or make a table of its columns")
    items, is_lazy = _open_iterable(rows.table)
    return PromptSource(items, has_rows=True, column=column, is_lazy=is_lazy)


def _open_iterable(prompts: Any) -> tuple[Iterable[Any], bool]:
    """It, and whether it is more than a list."""
    prompts = unpacked(prompts)
    if is_list(prompts):
        return prompts, False
    if isinstance(prompts, set | frozenset):
        raise ValueError(f"prompts must be in an order, and a {type(prompts).__name__} has none: make a list of it")
    if isinstance(prompts, TEXT_AND_BYTES) or not hasattr(prompts, "__iter__"):
        raise ValueError(
            f"prompts must be text, token ids, a dict or a list or iterable of these, got {type(prompts).__name__}"
        )
    return prompts, True


def _open_table(table: Any, column: str | None) -> PromptSource | None:
    """None for what is none."""
    if isinstance(table, Mapping):
        if hasattr(table, "column_names"):
            splits = ", ".join(map(shortened, table))
            raise ValueError(f"the dataset has splits: take one of them, dataset[name], of {splits}")
        return None
    is_lazy = False
    if hasattr(table, "column_names") and hasattr(table, "features"):
        names, rows, is_lazy = table.column_names, table, True  # the names of a stream may not be known
    elif hasattr(table, "itertuples") and hasattr(table, "columns"):
        names = list(map(str, table.columns))
        rows = (dict(zip(names, row, strict=True)) for row in table.itertuples(index=False, name=None))
    elif hasattr(table, "to_batches") and hasattr(table, "column_names"):
        names, rows = table.column_names, (row for batch in table.to_batches() for row in batch.to_pylist())
    elif hasattr(table, "columns") or hasattr(table, "column_names"):
        raise ValueError(f"a {type(table).__name__} is no table that is known here: give its rows, as Rows(dicts)")
    else:
        return None
    if names is not None:
        check_columns(names, column, FLAG)
    return PromptSource(rows, has_rows=True, column=column, is_lazy=is_lazy)


def read_source(source: PromptSource) -> Iterator[ReadPrompt]:
    """The prompts, one by one; ValueError, which says which it is, for one that cannot be read."""
    for number, item in enumerate(source.items):
        try:
            read = _read_row(item, source.column) if source.has_rows else ReadPrompt(read_prompt(item), {})
        except ValueError as error:
            raise ValueError(str(error) if source.is_one else f"prompt {number}: {error}") from None
        yield read


def _read_row(row: Any, column: str | None) -> ReadPrompt:
    if not isinstance(row, Mapping):
        raise ValueError(f"a row is a dict with a column of that name, got {shortened(row)}")
    name = prompt_column(row, column, FLAG)
    value = unpacked(row[name])
    used = {name}
    if name == "messages" or is_messages(value):
        options = {key: row[key] for key in OPTIONS if row.get(key) is not None}
        used |= set(options)
        prompt = Prompt(None, None, False, read_conversation({"messages": value, **options}))
    else:
        prompt = read_prompt(value)
    return ReadPrompt(prompt, {key: value for key, value in row.items() if key not in used})
