"""Batch files: lines of prompts in, lines of results out, in a run that may be stopped at any moment and resumed.

requests.py  what one input line asks for, or why it asks for nothing
input_formats.py  which files are read as lines, by name and first bytes
parse.py     bytes -> requests: which format a file has, one prompt or JSON object a line
openai_line.py  an OpenAI batch line, of either url
openai.py    the body of `/v1/completions`, and of its answer; openai_chat.py: of `/v1/chat/completions`
rows.py      outputs -> the JSON row that is written
resume.py    which rows of an earlier run still stand; changes.py: what is different where one does not
results.py   the output file: locked, appended row by row, never a row half or twice
run.py       requests through an LLM to rows

Nothing here imports jax or the engine: `run_batch` needs an object with `check_request` and `generate_iter`.
"""

from jaxpaged.batch.input_formats import format_of_name
from jaxpaged.batch.parse import parse_batch
from jaxpaged.batch.requests import (
    BatchContext,
    BatchRequest,
    InvalidLine,
    make_params,
    make_request,
)
from jaxpaged.batch.results import ResultStream, WriteError, open_result_file
from jaxpaged.batch.rows import error_row, failure_row, result_row
from jaxpaged.batch.run import check_requests, run_batch

__all__ = [
    "BatchContext",
    "BatchRequest",
    "InvalidLine",
    "ResultStream",
    "WriteError",
    "check_requests",
    "error_row",
    "failure_row",
    "format_of_name",
    "make_params",
    "make_request",
    "open_result_file",
    "parse_batch",
    "result_row",
    "run_batch",
]
