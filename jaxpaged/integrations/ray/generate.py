"""Generation as a stage of a Ray Data pipeline: a class that every worker of `map_batches` makes one of.

    from jaxpaged.integrations.ray import Generate

    rows = ray.data.read_parquet("questions.parquet")
    done = rows.map_batches(
        Generate,
        fn_constructor_kwargs=dict(model="/models/llama", params=dict(temperature=0, max_tokens=64)),
        concurrency=4,  # workers
        num_gpus=1,  # each
        batch_size=256,
    )
    done.write_parquet("answers")

A worker gets the path of the model and reads it itself. It needs nothing of Ray, and this module imports none: whoever
has batches of columns can call it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import logging
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.outputs import RequestOutput
from jaxpaged.api.request_params import RequestParams
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.llm import LLM

logger = logging.getLogger("jaxpaged")

#: The columns that are added, each `None` where a row has an error.
COLUMNS = "generated_text", "generated_token_ids", "finish_reason", "num_prompt_tokens", "error"
#: And one more where a row has several samples, or beams: of each its text, token ids, finish reason and score.
OUTPUTS = "outputs"

Batch = Mapping[str, Any]


class Generate:
    """Completes the prompts of a batch: columns in, the same columns and those of `COLUMNS` out, in the same order.

    A row that cannot run, or not to its end, has the reason in `error`, and the others are not touched. What is wrong
    with all rows (a column that is not there, or in the way) is a ValueError before any weights are read: they are read
    for the first batch. A sample that is drawn at random depends on its row's id alone, so it is the same in whichever
    worker and batch, and when a worker's rows are done again.
    """

    def __init__(
        self,
        model: str,
        *,
        params: RequestParams | Mapping[str, Any] | None = None,
        prompt_column: str = "prompt",
        id_column: str | None = None,
        param_columns: Iterable[str] = (),
        **options: Any,
    ):
        """
        Args:
            model: its directory, which every worker can read.
            params: SamplingParams or BeamSearchParams, or what SamplingParams takes, by name.
            prompt_column: of texts, of lists of token ids, or of conversations (lists of messages).
            id_column: tells rows apart, for seeds; by default rows of equal prompts get equal samples.
            param_columns: that hold a sampling parameter of their name for each row; where a row has None, it is
                that of `params`.
            **options: of `jaxpaged.LLM`.
        """
        self._model, self._options = model, options
        given = {} if params is None else params
        self._params = SamplingParams(**given) if isinstance(given, Mapping) else given
        self._prompt_column, self._id_column, self._param_columns = prompt_column, id_column, tuple(param_columns)
        types = {field.name: str(field.type) for field in dataclasses.fields(self._params)}
        if unknown := sorted(set(self._param_columns) - set(types)):
            kind = type(self._params).__name__
            raise ValueError(f"param_columns names {', '.join(map(repr, unknown))}, which {kind} does not have")
        # A column of whole numbers that some row has not got is one of floats, with NaN in that place.
        self._whole = {name for name in self._param_columns if "int" in types[name] and "float" not in types[name]}

    def __call__(self, batch: Batch) -> dict[str, Any]:
        self.check_columns(list(batch))
        began = time.perf_counter()
        rows = [_plain(value) for value in batch[self._prompt_column]]
        prompts, params, errors = self._requests(batch, rows)
        results: list[RequestOutput | None] = [None] * len(rows)
        runnable = [index for index, error in enumerate(errors) if error is None]
        if runnable:
            outputs = self._llm.generate(
                [prompts[index] for index in runnable], [params[index] for index in runnable], progress=False
            )
            for index, output in zip(runnable, outputs, strict=True):
                results[index], errors[index] = output, output.error
        if runnable:
            self._report(results, time.perf_counter() - began)
        return {**batch, **_columns(results, errors, self._has_several(params))}

    def check_columns(self, columns: Sequence[str]) -> None:
        """ValueError where a batch of these columns cannot be completed, for whatever is in them."""
        wanted = [self._prompt_column, *([self._id_column] if self._id_column else []), *self._param_columns]
        if missing := [name for name in wanted if name not in columns]:
            raise ValueError(f"no column {missing[0]!r}; there are {', '.join(map(repr, columns)) or 'none'}")
        if taken := [name for name in (*COLUMNS, OUTPUTS) if name in columns]:
            raise ValueError(f"the column {taken[0]!r} is there already, and would be written over: rename it")

    @cached_property
    def _llm(self) -> LLM:
        return LLM(self._model, **self._options)

    def _requests(self, batch: Batch, rows: list[Any]) -> tuple[list[Any], list[Any], list[str | None]]:
        """What to run for each row, and why it cannot be."""
        params: list[Any] = [None] * len(rows)
        errors: list[str | None] = [None] * len(rows)
        prompts = [{"messages": row} if _is_conversation(row) else row for row in rows]
        for index, prompt in enumerate(prompts):
            try:
                params[index] = self._params_of(batch, index, rows[index])
                if prompt is None:
                    raise ValueError(f"{self._prompt_column} is None")
                self._llm.check_request(prompt, params[index])
            except (ValueError, TypeError) as error:
                errors[index] = str(error)
        return prompts, params, errors

    def _params_of(self, batch: Batch, index: int, row: Any) -> RequestParams:
        cells = {name: _plain(batch[name][index]) for name in self._param_columns}
        values = {
            name: int(cell) if name in self._whole and isinstance(cell, float) and cell.is_integer() else cell
            for name, cell in cells.items() if not _is_missing(cell)
        }  # fmt: skip
        params = dataclasses.replace(self._params, **values)
        if isinstance(params, BeamSearchParams) or params.seed is not None:
            return params
        known = row if self._id_column is None else _plain(batch[self._id_column][index])
        return dataclasses.replace(params, seed=_seed(known))

    def _has_several(self, params: list[Any]) -> bool:
        return any(each is not None and each.num_samples > 1 for each in [self._params, *params])

    def _report(self, results: list[RequestOutput | None], seconds: float) -> None:
        """What this batch was: in the log, and as metrics of Ray, where it runs."""
        tokens = sum(len(one.token_ids) for output in results if output is not None for one in output.outputs)
        failed = sum(output is None or output.error is not None for output in results)
        engine = self._llm.engine
        used = int(engine.stats.pages_used.max(initial=0)) / engine.cache_config.num_usable_pages
        logger.info(
            "%d rows in %.1f s, %d of them with errors; %.0f tokens/s; at most %.0f %% of the pool",
            len(results), seconds, failed, tokens / seconds, 100 * used,
        )  # fmt: skip
        for name, value in (("tokens_per_second", tokens / seconds), ("pool_share", used)):
            if (gauge := _gauge(name)) is not None:
                gauge.set(value)


@cache
def _gauge(name: str) -> Any:
    """None in a process that is no worker of Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    metrics = importlib.import_module("ray.util.metrics")
    return metrics.Gauge(f"jaxpaged_{name}", description=f"{name.replace('_', ' ')} of a worker's last batch")


def _columns(results: list[RequestOutput | None], errors: list[str | None], has_several: bool) -> dict[str, list[Any]]:
    best = [None if output is None or not output.outputs else output.outputs[0] for output in results]
    columns: dict[str, list[Any]] = {
        "generated_text": [None if one is None else one.text for one in best],
        "generated_token_ids": [None if one is None else list(one.token_ids) for one in best],
        "finish_reason": [None if one is None else one.finish_reason for one in best],
        "num_prompt_tokens": [None if output is None else len(output.prompt_token_ids) for output in results],
        "error": errors,
    }
    if has_several:
        columns[OUTPUTS] = [[] if output is None else [_entry(one) for one in output.outputs] for output in results]
    return columns


def _entry(one: Any) -> dict[str, Any]:
    return {
        "text": one.text, "token_ids": list(one.token_ids), "finish_reason": one.finish_reason,
        "cumulative_logprob": one.cumulative_logprob,
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """A cell of a column as Python has it."""
    if isinstance(value, np.ndarray):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):  # a struct has all fields that some row has
        return {key: _plain(each) for key, each in value.items() if each is not None}
    return value


def _is_conversation(row: Any) -> bool:
    return isinstance(row, list) and bool(row) and all(isinstance(message, dict) for message in row)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value))


def _seed(known: Any) -> int:
    """Of what tells a row apart: the same in every process."""
    text = json.dumps(known, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=7).digest(), "little")
