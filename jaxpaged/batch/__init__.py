"""Batch files: lines of prompts in, lines of results out, in a run that may be stopped at any moment and resumed.

requests.py  what one input line asks for, or why it asks for nothing
input_formats.py  how a file is read, by name and first bytes; gzip_input.py: its bytes
parse.py     bytes -> records -> requests; json_file.py, tables.py: what is not lines; records.py: what all become
line_request.py  a record -> what it asks for; spelling.py: keys that are none of the caller's own
openai_line.py  an OpenAI batch line, of either url
openai.py    the body of `/v1/completions`, and of its answer; openai_chat.py: of `/v1/chat/completions`
rows.py      outputs -> the JSON row that is written
resume.py    which rows of an earlier run still stand; changes.py: what is different where one does not
packed_results.py, parquet_rows.py  outputs that are made when the run is over: Parquet, gzip
results.py   the output file: locked, appended row by row, never a row half or twice
run.py       requests through an LLM to rows

Nothing here imports jax or the engine: `run_batch` needs an object with `check_request` and `generate_iter`.
"""

from jaxpaged.batch.gzip_input import read_data
from jaxpaged.batch.input_formats import format_of_name
from jaxpaged.batch.packed_results import journal_of, open_packed_file, packing_of
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
    "journal_of",
    "make_params",
    "make_request",
    "open_packed_file",
    "open_result_file",
    "packing_of",
    "parse_batch",
    "read_data",
    "result_row",
    "run_batch",
]
