"""The body of an OpenAI `/v1/completions` batch line: the request in, the completion object out.

One line may hold a list of prompts; choice `p * n + s` is then sample s of prompt p. Besides OpenAI's parameters a body
may set every field of `SamplingParams` (top_k, min_p, ...), or of `BeamSearchParams` with a `beam_width`. `model` is
echoed, not compared: there is one model, the command's. Ids and `created` are functions of the request, never of the
clock: a resumed run writes the same file.

`tokens` are what each token adds to the text, so they join to it, and `text_offset` says where each begins in it. A
token that completes no character adds nothing, and so does what is not in the text (an end token, a stop string).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from jaxpaged.api.outputs import CompletionOutput, Logprob, RequestOutput, rounded
from jaxpaged.api.request_params import RequestParams
from jaxpaged.api.values import check_encodable, shortened
from jaxpaged.batch.json_values import bias_from_json, check_keys, is_token_list
from jaxpaged.batch.requests import PARAMETER_NAMES, BatchContext, BatchRequest, OpenAIOptions, Prompt, make_request
from jaxpaged.batch.response_format import with_response_format
from jaxpaged.text.stream import Decode, TextStream, text_pieces

BODY_KEYS = (
    "model", "prompt", "echo", "stream", "stream_options", "suffix", "user", "add_special_tokens", "response_format",
    *PARAMETER_NAMES,
)  # fmt: skip


def completion_request(index: int, custom_id: str, body: dict[str, Any], context: BatchContext) -> BatchRequest:
    check_keys(body, BODY_KEYS, "body key")
    body = {name: value for name, value in body.items() if value is not None}  # OpenAI: null is the default
    for name in ("stream", "stream_options", "suffix"):
        if body.get(name):
            raise ValueError(f"{name}={shortened(body[name])} is not supported in a batch: leave it out")
    echo = body.get("echo", False)
    if not isinstance(echo, bool):
        raise ValueError(f"echo must be true or false, got {shortened(echo)}")
    check_model(body)
    params = {name: body[name] for name in PARAMETER_NAMES if name in body}
    if "logit_bias" in params:
        params["logit_bias"] = bias_from_json(params["logit_bias"])
    params = with_response_format(params, body.get("response_format"))
    if echo and "logprobs" in params:
        params.setdefault("prompt_logprobs", params["logprobs"])
    options = OpenAIOptions(body.get("model"), echo)
    adds = body.get("add_special_tokens")
    return make_request(index, custom_id, _prompts(body.get("prompt")), params, context, options, adds)


def check_model(body: dict[str, Any]) -> None:
    if not isinstance(body.get("model", ""), str):
        raise ValueError(f"model must be a string, got {shortened(body['model'])}")


def _prompts(prompt: Any) -> list[Prompt]:
    """OpenAI's four forms: a string, token ids, a list of strings, a list of token id lists."""
    prompts = prompt if isinstance(prompt, list) and not is_token_list(prompt) else [prompt]
    for one in prompts:
        if isinstance(one, str):
            check_encodable(one, "prompt")
        elif not is_token_list(one):
            raise ValueError(
                f"prompt must be a string, a list of token ids, or a list of these, got {shortened(prompt)}"
            )
    if not prompts:
        raise ValueError("prompt is an empty list")
    return prompts


def completion_body(request: BatchRequest, outputs: Sequence[RequestOutput], decode: Decode | None) -> dict[str, Any]:
    """`outputs` has one entry a prompt of the request, in its order."""
    assert request.openai is not None
    choices = []
    for params, output in zip(request.params, outputs, strict=True):
        for sample in output.outputs:
            choices.append(_choice(len(choices), request.openai.echo, params, output, sample, decode))
    return {
        "id": f"cmpl-{request.fingerprint}",
        "object": "text_completion",
        "created": 0,
        "model": request.openai.model,
        "choices": choices,
        "usage": usage(outputs),
    }


def usage(outputs: Sequence[RequestOutput]) -> dict[str, int]:
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_completion = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
    }


def _choice(
    index: int,
    echo: bool,
    params: RequestParams,
    output: RequestOutput,
    sample: CompletionOutput,
    decode: Decode | None,
) -> dict[str, Any]:
    prompt_text = _prompt_text(output, sample, decode, params.skip_special_tokens) if echo else ""
    logprobs = None
    if params.logprobs is not None:
        pieces = output_pieces(output, sample, params, decode)
        if echo and output.prompt_logprobs is not None:
            prompt_pieces = _prompt_pieces(output, prompt_text, decode, params.skip_special_tokens)
            prompt_text = "".join(prompt_pieces)
            logprobs = _logprobs(
                [*output.prompt_token_ids, *sample.token_ids],
                [*output.prompt_logprobs, *(sample.logprobs or [])], [*prompt_pieces, *pieces], 0, decode is not None,
            )  # fmt: skip
        else:
            logprobs = _logprobs(sample.token_ids, sample.logprobs or [], pieces, len(prompt_text), decode is not None)
    return {
        "index": index,
        "text": prompt_text + sample.text,
        "logprobs": logprobs,
        "finish_reason": sample.finish_reason,
    }


def _prompt_text(output: RequestOutput, sample: CompletionOutput, decode: Decode | None, skip_special: bool) -> str:
    """As it was given; of token ids their text, without a character that the sample completes."""
    if output.prompt is not None or decode is None:
        return output.prompt or ""
    prompt_ids = output.prompt_token_ids
    whole = "".join(text_pieces(decode, [], [*prompt_ids, *sample.token_ids], skip_special))
    added = "".join(text_pieces(decode, prompt_ids, sample.token_ids, skip_special))
    return whole.removesuffix(added)


def _prompt_pieces(output: RequestOutput, text: str, decode: Decode | None, skip_special: bool) -> list[str]:
    """Its tokens' pieces; they join to another text only where the tokenizer writes the prompt in another way."""
    ids = output.prompt_token_ids
    if decode is None:
        return [""] * len(ids)
    for skip in (skip_special, False):  # special tokens that are spelt in the prompt are part of its text
        stream = TextStream(decode, [], skip)
        pieces = [stream.push(token_id) for token_id in ids]
        if text.startswith(joined := "".join(pieces)):
            return [*pieces[:-1], pieces[-1] + text[len(joined) :]]
    return text_pieces(decode, [], ids, skip_special)


def output_pieces(
    output: RequestOutput, sample: CompletionOutput, params: RequestParams, decode: Decode | None
) -> list[str]:
    """The sample's text, cut as its tokens come; without a text, what each token would add to it."""
    if decode is None:
        return [""] * len(sample.token_ids)
    pieces = text_pieces(decode, output.prompt_token_ids, sample.token_ids, params.skip_special_tokens)
    if not params.detokenize:
        return pieces
    ends = [0, *itertools.accumulate(map(len, pieces))]
    return [sample.text[start:end] for start, end in itertools.pairwise(ends)]


def _logprobs(
    token_ids: Sequence[int],
    logprobs: Sequence[dict[int, Logprob] | None],
    pieces: Sequence[str],
    offset: int,
    has_text: bool,
) -> dict[str, list[Any]]:
    """OpenAI's four parallel lists. The first prompt token has no log-probability."""
    tokens, token_logprobs, top_logprobs, offsets = [], [], [], []
    for token_id, candidates, piece in zip(token_ids, logprobs, pieces, strict=True):
        token = piece if has_text else f"token_id:{token_id}"
        tokens.append(token)
        token_logprobs.append(None if candidates is None else rounded(candidates[token_id].logprob))
        top_logprobs.append(None if candidates is None else _top_logprobs(candidates, token_id, token))
        offsets.append(offset)
        offset += len(piece)
    return {"tokens": tokens, "token_logprobs": token_logprobs, "top_logprobs": top_logprobs, "text_offset": offsets}


def _top_logprobs(candidates: dict[int, Logprob], chosen_id: int, chosen: str) -> dict[str, float]:
    """One key for each candidate: its text, as in `tokens`, or where that is taken or empty, `token_id:` and its id."""
    names = {chosen: chosen_id}
    for token_id, candidate in candidates.items():
        if token_id != chosen_id:
            text = candidate.decoded_token
            name = f"token_id:{token_id}" if not text or text in names else text
            names[name] = token_id
    return {name: rounded(candidates[token_id].logprob) for name, token_id in names.items()}
