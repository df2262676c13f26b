"""Outputs -> the JSON rows that are written.

A row holds nothing that depends on the clock or on what ran beside it, so a resumed run writes the same rows as an
undisturbed one: no times, no page counts, and log-probabilities only of beams and where they are asked for. (Their last
digits do depend on which requests shared a step: floating-point sums of another batch size go in another order.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxpaged.api.outputs import RequestOutput
from jaxpaged.batch.openai import completion_body
from jaxpaged.batch.openai_chat import chat_body
from jaxpaged.batch.requests import BatchRequest, InvalidLine
from jaxpaged.text.stream import Decode

#: What every row begins with, in bytes: how a row that was cut off is told from somebody else's file.
ROW_START = b'{"id": '


def result_row(request: BatchRequest, outputs: Sequence[RequestOutput], decode: Decode | None) -> dict[str, Any]:
    """The row of a finished line; `outputs` has one entry a prompt of the request, in its order."""
    if request.is_openai:
        make_body = chat_body if request.is_chat else completion_body
        body = make_body(request, outputs, decode)
        response = {"status_code": 200, "request_id": f"req_{request.fingerprint}", "body": body}
        return _openai_row(request, request.fingerprint, response, error=None)
    (output,), (params,) = outputs, request.params
    own = {"id": request.id, "index": request.index}
    return {
        **own,
        **output.to_dict(),
        **own,
        "seed": params.seed,
        "fingerprint": request.fingerprint,
        **request.carried,
    }


def error_row(line: BatchRequest | InvalidLine, reason: str) -> dict[str, Any]:
    """The row of a line that cannot run. It stands, for a run that is resumed, while line and options are the same."""
    return _error_row(line, reason, "invalid_request", line.error_fingerprint)


def failure_row(request: BatchRequest, outputs: Sequence[RequestOutput]) -> dict[str, Any] | None:
    """The row of a line that ran and could not go on; None where all is well.

    Its fingerprint is that of a result, which no error may have: a run that is resumed does the line again.
    """
    failed = [(i, output.error) for i, output in enumerate(outputs, start=1) if output.error is not None]
    if not failed:
        return None
    reasons = [error if len(outputs) == 1 else f"prompt {i}: {error}" for i, error in failed]
    return _error_row(request, "; ".join(reasons), "generation_failed", request.fingerprint)


def _error_row(line: BatchRequest | InvalidLine, reason: str, code: str, fingerprint: str) -> dict[str, Any]:
    message = f"{line.unit} {line.index + 1}: {reason}"
    if line.is_openai:
        row = _openai_row(line, fingerprint, response=None, error={"code": code, "message": message})
        return {**row, "line": line.index + 1}
    return {
        "id": str(line.index) if line.id is None else line.id,
        "index": line.index,
        "line": line.index + 1,
        "error": {"message": message},
        "fingerprint": fingerprint,
        **line.carried,
    }


def _openai_row(line: BatchRequest | InvalidLine, fingerprint: str, response: Any, error: Any) -> dict[str, Any]:
    return {
        "id": f"batch_req_{fingerprint}",
        "custom_id": line.id,
        "response": response,
        "error": error,
        "index": line.index,
        "fingerprint": fingerprint,
    }
