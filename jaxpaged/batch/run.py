"""Requests through an LLM to rows, each written as soon as its line is finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from jaxpaged.api.outputs import RequestOutput
from jaxpaged.api.request_params import RequestParams
from jaxpaged.batch.requests import BatchRequest


class GeneratingLLM(Protocol):
    """What a batch needs of `jaxpaged.LLM`."""

    def check_request(self, prompt: Any, params: RequestParams, shared_prefix: Any = None) -> None: ...

    def generate_iter(
        self, prompts: Any, sampling_params: Any, *, request_ids: list[str] | None = None, shared_prefix: Any = None
    ) -> Iterator[RequestOutput]: ...


def check_requests(
    llm: GeneratingLLM, requests: Sequence[BatchRequest], shared_prefix: Any = None
) -> tuple[list[BatchRequest], list[tuple[BatchRequest, str]]]:
    """The requests that this model and pool can run, and those that they cannot, with the reason."""
    accepted, refused = [], []
    for request in requests:
        try:
            for prompt, params in zip(request.given_prompts, request.params, strict=True):
                llm.check_request(prompt, params, shared_prefix)
        except ValueError as error:
            refused.append((request, str(error)))
        else:
            accepted.append(request)
    return accepted, refused


def run_batch(
    llm: GeneratingLLM,
    requests: Sequence[BatchRequest],
    on_finished: Callable[[BatchRequest, list[RequestOutput]], None],
    shared_prefix: Any = None,
) -> None:
    """Run checked requests together; `on_finished` gets each as it ends, with one output a prompt, in prompt order."""
    owner = {f"{r.index}.{part}": (r, part) for r in requests for part in range(len(r.prompts))}
    prompts = [prompt for r in requests for prompt in r.given_prompts]
    params = [p for r in requests for p in r.params]
    outputs: dict[int, dict[int, RequestOutput]] = {r.index: {} for r in requests}
    for output in llm.generate_iter(prompts, params, request_ids=list(owner), shared_prefix=shared_prefix):
        request, part = owner[output.request_id]
        finished = outputs[request.index]
        finished[part] = output
        if len(finished) == len(request.prompts):
            on_finished(request, [finished[p] for p in range(len(finished))])
            del outputs[request.index]
    assert not outputs, f"lines without a result: {sorted(outputs)}"
