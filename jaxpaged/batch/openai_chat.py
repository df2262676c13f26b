"""The body of an OpenAI `/v1/chat/completions` batch line: messages in, the chat completion object out.

Besides OpenAI's parameters a body may set what a chat template reads (`documents`, `chat_template_kwargs`, ...) and
every field of `SamplingParams` or `BeamSearchParams`; but `logprobs` is true or false here, and `top_logprobs` how
many. Tools are rendered for the model to read, and what it writes is text: calls in it are not taken out. As with
OpenAI, an answer without `max_tokens` may be as long as the model's length allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxpaged.api.messages import OPTIONS, read_conversation
from jaxpaged.api.outputs import CompletionOutput, Logprob, RequestOutput, rounded
from jaxpaged.api.request_params import RequestParams
from jaxpaged.api.values import shortened
from jaxpaged.batch.json_values import bias_from_json, check_keys
from jaxpaged.batch.openai import check_model, output_pieces, usage
from jaxpaged.batch.requests import PARAMETER_NAMES, BatchContext, BatchRequest, OpenAIOptions, make_request
from jaxpaged.batch.response_format import with_response_format
from jaxpaged.text.stream import Decode

MAX_TOP_LOGPROBS = 20
#: Notes of the caller's, which change nothing.
NOTES = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
#: What may be there with a value that asks for what happens anyway.
ONLY = {
    "stream": (False,), "stream_options": ({},), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True,),
    "modalities": (["text"],),
}  # fmt: skip
PARAMETERS = tuple(name for name in PARAMETER_NAMES if name not in ("logprobs", "prompt_logprobs"))
BODY_KEYS = (
    "model", "messages", *OPTIONS, "max_completion_tokens", "logprobs", "top_logprobs", "response_format", *ONLY,
    *NOTES, *PARAMETERS,
)  # fmt: skip


def chat_request(index: int, custom_id: str, body: dict[str, Any], context: BatchContext) -> BatchRequest:
    check_keys(body, BODY_KEYS, "body key")
    body = {name: value for name, value in body.items() if value is not None}  # OpenAI: null is the default
    for name, possible in ONLY.items():
        if name in body and body[name] not in possible:
            words = " or ".join(map(repr, possible))
            raise ValueError(f"{name}={shortened(body[name])} is not supported: leave it out, or say {words}")
    check_model(body)
    params = {name: body[name] for name in PARAMETERS if name in body}
    if "logit_bias" in params:
        params["logit_bias"] = bias_from_json(params["logit_bias"])
    params = with_response_format(params, body.get("response_format"))
    if "max_tokens" not in {**context.params, **params}:
        params["max_tokens"] = None
    if "max_completion_tokens" in body:
        if body.get("max_tokens", body["max_completion_tokens"]) != body["max_completion_tokens"]:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        params["max_tokens"] = body["max_completion_tokens"]
    if "logprobs" in body or "top_logprobs" in body:
        params["logprobs"] = _num_logprobs(body)
    options = OpenAIOptions(body.get("model"), echo=False)
    return make_request(index, custom_id, [conversation_of(body, context)], params, context, options)


def conversation_of(values: dict[str, Any], context: BatchContext) -> dict[str, Any]:
    """The messages of a line and what stands beside them, as a prompt; checked as far as that needs no model."""
    prompt = {name: values[name] for name in ("messages", *OPTIONS) if values.get(name) is not None}
    if context.chat_template is not None:
        prompt.setdefault("chat_template", context.chat_template)
    read_conversation(prompt)
    return prompt


def _num_logprobs(body: dict[str, Any]) -> int | None:
    wanted, most = body.get("logprobs", False), body.get("top_logprobs", 0)
    if not isinstance(wanted, bool):
        raise ValueError(f"logprobs must be true or false, got {shortened(wanted)}: top_logprobs says how many")
    if type(most) is not int or not 0 <= most <= MAX_TOP_LOGPROBS:
        raise ValueError(f"top_logprobs must be an integer from 0 to {MAX_TOP_LOGPROBS}, got {shortened(most)}")
    if most and not wanted:
        raise ValueError(f"top_logprobs={most} needs logprobs to be true")
    return most if wanted else None


def chat_body(request: BatchRequest, outputs: Sequence[RequestOutput], decode: Decode | None) -> dict[str, Any]:
    assert request.openai is not None
    (output,), (params,) = outputs, request.params
    return {
        "id": f"chatcmpl-{request.fingerprint}",
        "object": "chat.completion",
        "created": 0,
        "model": request.openai.model,
        "choices": [_choice(params, output, sample, decode) for sample in output.outputs],
        "usage": usage(outputs),
    }


def _choice(
    params: RequestParams, output: RequestOutput, sample: CompletionOutput, decode: Decode | None
) -> dict[str, Any]:
    logprobs = None
    if params.logprobs is not None:
        pieces = output_pieces(output, sample, params, decode)
        entries = zip(sample.token_ids, pieces, sample.logprobs or [], strict=True)
        logprobs = {"content": [_token(*entry, params.logprobs) for entry in entries], "refusal": None}
    return {
        "index": sample.index,
        "message": {"role": "assistant", "content": sample.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": sample.finish_reason,
    }


def _token(token_id: int, piece: str, candidates: dict[int, Logprob], most: int) -> dict[str, Any]:
    """One token as it stands in the text, and the likeliest in its place: `most`, or all with -1."""
    best = sorted(candidates.items(), key=lambda candidate: candidate[1].rank)
    return {
        **_named(piece, candidates[token_id]),
        "top_logprobs": [
            _named(piece if other == token_id else candidate.decoded_token or "", candidate)
            for other, candidate in best
            if most < 0 or candidate.rank <= most
        ],
    }


def _named(text: str, candidate: Logprob) -> dict[str, Any]:
    return {"token": text, "logprob": rounded(candidate.logprob), "bytes": list(text.encode())}
