"""Results as a table of pandas, which is an extra: imported when somebody asks for one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

from jaxpaged.api.carried import new_names
from jaxpaged.api.outputs import RequestOutput

#: The columns that every table has; of a sample, but for the first three and the last.
COLUMNS = (
    "id", "prompt", "num_prompt_tokens", "sample", "text", "token_ids", "finish_reason", "stop_reason", "score",
    "cumulative_logprob", "logprobs", "error",
)  # fmt: skip


def to_dataframe(outputs: RequestOutput | Iterable[RequestOutput]) -> Any:
    """A DataFrame with a row a sample, in order, of what `generate` returned or `generate_iter` yields.

    The columns are `id, prompt, num_prompt_tokens, sample, text, token_ids, finish_reason, stop_reason, score,
    cumulative_logprob, logprobs, error`, and what the results carry, as it was given. A
    request without a sample has one row.
    """
    if importlib.util.find_spec("pandas") is None:
        raise ImportError("to_dataframe needs pandas, which is not installed: pip install 'jaxpaged[dataframe]'")
    import pandas

    listed = [outputs] if isinstance(outputs, RequestOutput) else list(outputs)
    for output in listed:
        if not isinstance(output, RequestOutput):
            raise ValueError(f"to_dataframe takes what generate returns, got {type(output).__name__}")
    rows = [row for output in listed for row in _rows(output)]
    carried = dict.fromkeys(name for row in rows for name in row if name not in COLUMNS)
    return pandas.DataFrame(rows, columns=[*COLUMNS, *carried])


def _rows(output: RequestOutput) -> list[dict[str, Any]]:
    own = {
        "id": output.request_id,
        "prompt": output.prompt,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "error": output.error,
    }
    names = new_names(output.carried, COLUMNS)
    carried = {name: output.carried[key] for name, key in names.items()}
    samples = [_sample(sample.to_dict(), sample.cumulative_logprob) for sample in output.outputs]
    return [{**own, **sample, **carried} for sample in samples or [{}]]


def _sample(sample: dict[str, Any], cumulative_logprob: float) -> dict[str, Any]:
    return {"sample": sample.pop("index"), **sample, "cumulative_logprob": cumulative_logprob}
